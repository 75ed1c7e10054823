r"""What `prune` removes, and what that costs in error: `prune_runs.py FOLDER...` writes results/prune.json and .md.

Each FOLDER is a comparison of sgd and prune under the same settings:

    lowcal compare --recipe digits --methods sgd,prune --seeds 3 --device cpu --out runs/prune-digits \
      --set epochs=120 --set prune.ratio=0.5
    lowcal compare --recipe vgg13-cifar10 --methods sgd,prune --seeds 2 --data-dir path/to/cifar10 --device cpu \
      --out runs/prune-cifar10 --set data.train_images=5000 --set data.test_images=2000 --set model.width=8 \
      --set threads=1 --set batch=32 --set epochs=40 --set lr_schedule.every=25 --set prune.every=5 \
      --set prune.ratio=0.3

About 10 and 15 minutes on one quiet hyperthread.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, write
from lowcal.report.runs import RunData, read_runs
from lowcal.report.table import Column, Table


def row(runs: Sequence[RunData]) -> dict[str, Any]:
    """What is said of one comparison; lists are by seed."""
    sgd, pruned = ([run for run in runs if run.method == method] for method in ("sgd", "prune"))
    if [run.seed for run in sgd] != [run.seed for run in pruned]:
        raise SystemExit("sgd and prune have different seeds; give the folder of one comparison")
    first = pruned[0]
    return {
        "model": first.model,
        "dataset": first.dataset,
        "settings": first.settings,
        "seeds": [run.seed for run in pruned],
        "sgd_top1_errors": [run.results["top1_error"] for run in sgd],
        "prune_top1_errors": [run.results["top1_error"] for run in pruned],
        "channels": [_channels(run) for run in pruned],
        "epochs_of_removal": [_removals(run) for run in pruned],
        "flops_ratio": [b.results["flops"] / a.results["flops"] for a, b in zip(sgd, pruned, strict=True)],
        "last_epoch_flops_ratio": [
            b.records[-1]["flops"] / a.records[-1]["flops"] for a, b in zip(sgd, pruned, strict=True)
        ],
        "code": sorted({run.code for run in runs}),
        "environment": first.environment,
    }


def _channels(run: RunData) -> list[int]:
    return [run.records[0]["channels"], run.records[-1]["channels"]]


def _removals(run: RunData) -> list[int]:
    """The epochs, counted from 1, at whose end channels went."""
    counts = [record["channels"] for record in run.records]
    return [number + 1 for number in range(1, len(counts)) if counts[number] < counts[number - 1]]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a row for each comparison: means over seeds, with the lowest and the highest."""
    columns = (
        Column("network", "network", _network, left=True),
        Column("r", "r", lambda row: f"{row['settings']['prune']['ratio']:g}"),
        Column("epochs", "epochs", lambda row: str(row["settings"]["epochs"])),
        Column("sgd", "top-1 error, %: sgd", lambda row: spread(row["sgd_top1_errors"])),
        Column("prune", "prune", lambda row: spread(row["prune_top1_errors"])),
        Column("channels", "channels left", _channels_left),
        Column("flops", "FLOPs of the run", lambda row: spread(row["flops_ratio"])),
        Column("last_flops", "of its last epoch", lambda row: spread(row["last_epoch_flops_ratio"])),
        Column("seeds", "seeds", lambda row: str(len(row["seeds"]))),
    )
    return Table(columns, rows)


def _network(row: Mapping[str, Any]) -> str:
    width = row["settings"]["model"]["width"]
    return f"{row['model']}{f' of width {width}' if width else ''}, {row['dataset']}"


def _channels_left(row: Mapping[str, Any]) -> str:
    return f"{spread([last for _, last in row['channels']], 0)} of {row['channels'][0][0]}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, with the lowest and the highest value if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    write(RESULTS / "prune", table([row(read_runs([Path(name)])) for name in sys.argv[1:]]))
