"""`refresh` against SGD in less time, on all seeds: `refresh_seeds.py --out results/cifar10-jpeg-small`.

Reads the runs of ResNet18 that benchmarks/cifar10.py trained (its first two seeds) and, in OUT-seeds, those that were
trained afterwards from their recipes (`lowcal compare --recipe RUN/recipe.yaml --set seed=2 ...`). Errors alone: times
are those of cifar10.py's table, whose runs took turns. SGD in the time of `refresh` lies on a straight line between its
two compressed runs of the same seed; so does SGD with as many FLOPs, in which there is no noise.
Writes OUT/refresh-seeds.json and .md.
"""

import json
import statistics
from pathlib import Path

from common import script, write
from lowcal.report.table import Column, Table, with_spread

NETWORK = "resnet18-cifar10"
LESS, METHOD, MORE = "sgd-compressed-14", "refresh", "sgd-compressed-16"  # in the order of their time


def errors(cell: str, folders: list[Path]) -> list[float]:
    """The last top-1 error of the run of `cell` with each seed, in percent."""
    found = {}
    for folder in folders:
        for run in folder.glob(f"{cell}-set-*-seed*"):
            records = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
            found[int(run.name.rpartition("seed")[2])] = records[-1]["top1_error"]
    return [found[seed] for seed in range(len(found))]


def on_line(found: dict[str, list[float]], cost: dict[str, float]) -> list[float]:
    """SGD's error with each seed at the cost of `METHOD`: its time or its FLOPs."""
    place = (cost[METHOD] - cost[LESS]) / (cost[MORE] - cost[LESS])
    return [less + (more - less) * place for less, more in zip(found[LESS], found[MORE], strict=True)]


def main() -> None:
    """Reads, prints and writes."""
    out = script(__doc__).parse_args().out
    folders = [out / f"{NETWORK}-small", out.with_name(f"{out.name}-seeds")]
    told = {row["name"]: row for row in json.loads((out / f"{NETWORK}.json").read_text())["rows"]}
    found = {name: errors(name, folders) for name in (LESS, METHOD, MORE)}
    own, speedups = found[METHOD], {name: told[name]["steady_speedup"] for name in found}
    shown = {f"{name}, {speedups[name]:.2f}×": found[name] for name in (LESS, MORE, METHOD)}
    costs = {
        f"in the time of {METHOD}": {name: 1.0 / speedup for name, speedup in speedups.items()},
        f"with the FLOPs of {METHOD}, {1.0 / told[METHOD]['flops_ratio']:.2f}×": {
            name: told[name]["flops_ratio"] for name in found
        },
    }
    for words, cost in costs.items():
        line = on_line(found, cost)
        shown[f"SGD {words}"] = line
        shown[f"{METHOD} less SGD {words.partition(',')[0]}"] = [a - b for a, b in zip(own, line, strict=True)]
    rows = [
        {"name": name, "by_seed": values, "mean": statistics.mean(values), "std": statistics.stdev(values)}
        for name, values in shown.items()
    ]

    def seed_column(seed: int) -> Column:
        return Column("", f"seed {seed}", lambda row: f"{row['by_seed'][seed]:.2f}")

    columns = (
        Column("name", "top-1 error, %"),
        *map(seed_column, range(len(own))),
        Column("mean", "mean", lambda row: with_spread(row["mean"], row["std"], len(own))),
    )
    write(out / "refresh-seeds", Table(columns, rows), network=NETWORK)


if __name__ == "__main__":
    main()
