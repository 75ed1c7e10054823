"""`refresh` against SGD in less time, on all seeds: `refresh_seeds.py --out results/cifar10-jpeg-small`.

Reads the runs of ResNet18 that benchmarks/cifar10.py trained (its first two seeds) and, in OUT-seeds, those that were
trained afterwards from their recipes (`lowcal compare --recipe RUN/recipe.yaml --set seed=2 ...`). Errors alone: times
are those of cifar10.py's table, whose runs took turns. SGD in the time of `refresh` lies on a straight line between its
two compressed runs of the same seed. Writes OUT/refresh-seeds.json and .md.
"""

import argparse
import json
import statistics
from pathlib import Path

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


def on_line(less: float, more: float, speedups: dict[str, float]) -> float:
    """SGD's error in the time of `METHOD`."""
    time = {name: 1.0 / speedups[name] for name in (LESS, METHOD, MORE)}
    return less + (more - less) * (time[METHOD] - time[LESS]) / (time[MORE] - time[LESS])


def main() -> None:
    """Reads, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    folders = [out / f"{NETWORK}-small", out.with_name(f"{out.name}-seeds")]
    speedups = {row["name"]: row["steady_speedup"] for row in json.loads((out / f"{NETWORK}.json").read_text())["rows"]}
    found = {name: errors(name, folders) for name in (LESS, METHOD, MORE)}
    line = [on_line(less, more, speedups) for less, more in zip(found[LESS], found[MORE], strict=True)]
    shown = {
        f"{LESS}, {speedups[LESS]:.2f}×": found[LESS],
        f"{MORE}, {speedups[MORE]:.2f}×": found[MORE],
        f"SGD in the time of {METHOD}": line,
        f"{METHOD}, {speedups[METHOD]:.2f}×": found[METHOD],
        "difference of the last two": [own - rival for own, rival in zip(found[METHOD], line, strict=True)],
    }
    rows = [
        {"name": name, "by_seed": values, "mean": statistics.mean(values), "std": statistics.stdev(values)}
        for name, values in shown.items()
    ]
    result = {"format": 1, "network": NETWORK, "rows": rows}
    (out / "refresh-seeds.json").write_text(json.dumps(result, indent=1) + "\n")
    seeds = range(len(line))
    lines = [
        f"| top-1 error, % | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        f"| --- | {' | '.join('---:' for _ in seeds)} | ---: |",
    ]
    for row in rows:
        cells = " | ".join(f"{value:.2f}" for value in row["by_seed"])
        lines.append(f"| {row['name']} | {cells} | {row['mean']:.2f} ± {row['std']:.2f} |")
    (out / "refresh-seeds.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
