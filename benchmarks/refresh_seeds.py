"""`refresh` against SGD in less time, on all seeds: `refresh_seeds.py --out results/cifar10-jpeg-small`.

Reads the runs of ResNet18 that benchmarks/cifar10.py trained (its first two seeds) and, in OUT-seeds, those that were
trained afterwards from their recipes (`lowcal compare --recipe RUN/recipe.yaml --set seed=2 ...`). Errors alone: times
are those of cifar10.py's table, whose runs took turns. Writes OUT/refresh-seeds.json and .md.
"""

import argparse
import json
import statistics
from pathlib import Path

NETWORK = "resnet18-cifar10"
CELLS = ("sgd-compressed-14", "refresh", "sgd-compressed-16")  # in the order of their time


def errors(cell: str, folders: list[Path]) -> dict[int, float]:
    """The last top-1 error of each seed's run of `cell`, in percent."""
    found = {}
    for folder in folders:
        for run in folder.glob(f"{cell}-set-*-seed*"):
            records = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
            found[int(run.name.rpartition("seed")[2])] = records[-1]["top1_error"]
    return dict(sorted(found.items()))


def main() -> None:
    """Reads, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    folders = [out / f"{NETWORK}-small", out.with_name(f"{out.name}-seeds")]
    speedups = {row["name"]: row["steady_speedup"] for row in json.loads((out / f"{NETWORK}.json").read_text())["rows"]}
    rows = []
    for cell in CELLS:
        by_seed = errors(cell, folders)
        values = list(by_seed.values())
        rows.append(
            {
                "name": cell,
                "speedup": speedups[cell],
                "top1_error": statistics.mean(values),
                "top1_error_std": statistics.stdev(values),
                "by_seed": by_seed,
            }
        )
    (out / "refresh-seeds.json").write_text(
        json.dumps({"format": 1, "network": NETWORK, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        f"| method | speed-up | {' | '.join(f'seed {seed}' for seed in rows[0]['by_seed'])} | mean, % |",
        f"| --- | ---: | {' | '.join('---:' for _ in rows[0]['by_seed'])} | ---: |",
    ]
    for row in rows:
        cells = " | ".join(f"{value:.2f}" for value in row["by_seed"].values())
        mean = f"{row['top1_error']:.2f} ± {row['top1_error_std']:.2f}"
        lines.append(f"| {row['name']} | {row['speedup']:.2f}× | {cells} | {mean} |")
    (out / "refresh-seeds.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
