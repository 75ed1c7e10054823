"""The figures of docs/cifar10.md: every method on ResNet18 and VGG13, with CIFAR-10, beside SGD in less time.

    python benchmarks/cifar10.py --data-dir DIR --out FOLDER --seeds 2

Trains what is missing in FOLDER (a results folder of `lowcal reproduce`): Table 2's methods, ours, and SGD with its
schedule compressed, those of one network and seed in turn. Writes FOLDER/RECIPE.json, .md and .svg from what is
finished.

Speed-ups are those of `steady_speedup`, since other work on the machine comes in bursts.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Log, script, write
from lowcal.experiments.assemble import find_device
from lowcal.experiments.reproduce.paper import Cell, compressed_names, published
from lowcal.experiments.reproduce.results import Results
from lowcal.experiments.reproduce.run import train_missing
from lowcal.report.figures import save
from lowcal.report.frontier import Spot, frontier
from lowcal.report.runs import RunData
from lowcal.report.table import ABSENT, Column, Table
from lowcal.training.process import keep_freed_memory
from steady_speedup import kind_of, steady_times

METHODS = {
    "resnet18-cifar10": ("sgd", "local", "freeze", "refresh", "stochastic-depth", "prune"),
    "vgg13-cifar10": ("sgd", "local", "freeze", "refresh", "prune"),
}
SETTINGS = ("lr_schedule.name=cosine", "optimizer.lr=0.05", "model.width=8", "threads=1", "channels_last=true")


def cells_of(recipe: str, results: Results) -> list[Cell]:
    """What is trained; without the shortest of the compressed runs."""
    names = [*METHODS[recipe], "local-step-0.0003", *compressed_names(results.base(recipe))[1:]]
    return [results.cell(recipe, name) for name in names]


def steady(runs: dict[str, list[RunData]], cells: dict[str, Cell]) -> dict[str, float]:
    """The time of each cell's runs over that of sgd, see `steady_speedup`."""
    records = {name: {run.seed: run.records for run in group} for name, group in runs.items()}
    times = steady_times(records, lambda name, record: kind_of(cells[name].method, record))
    return {name: time / times["sgd"] for name, time in times.items()}


def line_at(line: list[tuple[float, float]], time: float) -> float | None:
    """The error of SGD in `time`, on straight lines between its runs; None outside of them."""
    for (before, worse), (after, better) in pairwise(line):
        if before <= time <= after:
            return worse + (better - worse) * (time - before) / (after - before)
    return None


def summarise(recipe: str, results: Results, seeds: int) -> list[dict[str, Any]]:
    """A row for each cell that is finished."""
    cells = {cell.name: cell for cell in cells_of(recipe, results)}
    runs = {name: found for name, cell in cells.items() if (found := results.runs(cell, seeds))}
    shared = set.intersection(*({run.seed for run in group} for group in runs.values()))
    runs = {name: [run for run in group if run.seed in shared] for name, group in runs.items()}
    times = steady(runs, cells)
    by_seed = [steady({n: [r for r in g if r.seed == seed] for n, g in runs.items()}, cells) for seed in sorted(shared)]
    errors = {name: [run.records[-1]["top1_error"] for run in group] for name, group in runs.items()}
    line = sorted((times[name], statistics.mean(errors[name])) for name in runs if name.startswith("sgd"))
    flops = {n: statistics.mean(sum(r["flops"] for r in run.records) for run in g) for n, g in runs.items()}
    rows = []
    for name, group in runs.items():
        rival = None if name.startswith("sgd") else line_at(line, times[name])
        cell = cells[name]
        paper_error, paper_speedup = published(recipe, cell.name)
        rows.append(
            {
                "name": name,
                "seeds": len(group),
                "epochs": len(group[0].records),
                "top1_error": statistics.mean(errors[name]),
                "top1_error_std": statistics.stdev(errors[name]) if len(group) > 1 else None,
                "top1_errors": errors[name],
                "steady_speedup": 1 / times[name],
                "steady_speedups": [1 / own[name] for own in by_seed],
                "code": sorted({run.code for run in group}),
                "wall_seconds": statistics.mean(run.records[-1]["total_seconds"] for run in group),
                "flops_ratio": flops[name] / flops["sgd"],
                "boundary": [run.records[-1]["boundary"] for run in group],
                "layers": group[0].records[-1]["layers"],
                "sgd_in_that_time": rival,
                "paper_top1_error": paper_error,
                "paper_speedup": paper_speedup,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the table for the documentation."""
    columns = (
        Column("name", "method"),
        Column("top1_error", "top-1 error, %", lambda row: of_seeds(row["top1_error"], row["top1_errors"])),
        Column("paper_top1_error", "paper's", ".2f"),
        Column("speedup", "speed-up", lambda row: of_seeds(row["steady_speedup"], row["steady_speedups"], "×")),
        Column("paper_speedup", "paper's", ".2f", "×"),
        Column("flops_ratio", "FLOPs", ".2f", "×"),
        Column("boundary", "last boundary", _last_boundary),
        Column("sgd_in_that_time", "SGD in that time", ".2f"),
        Column("seeds", "seeds", "number"),
    )
    return Table(columns, rows)


def _last_boundary(row: Mapping[str, Any]) -> str:
    return f"{statistics.mean(row['boundary']):.3g} of {row['layers']}" if any(row["boundary"]) else ABSENT


def of_seeds(value: float, by_seed: Sequence[float], unit: str = "") -> str:
    """Return `value` with the spread of the seeds; of two seeds both values, whose mean `value` need not be."""
    text = f"{value:.2f}{unit}"
    if len(set(by_seed)) < 2:
        return text
    if len(by_seed) > 2:
        return f"{text} ± {statistics.stdev(by_seed):.2f}"
    return f"{text} ({min(by_seed):.2f} to {max(by_seed):.2f})"


def draw(recipe: str, rows: list[dict[str, Any]], path: Path) -> None:
    """The frontier: error against time, with the line of compressed SGD."""
    whole = next(row["wall_seconds"] for row in rows if row["name"] == "sgd")
    at = {row["name"]: (whole / row["steady_speedup"], row["top1_error"]) for row in rows}
    line = sorted(point for name, point in at.items() if name.startswith("sgd"))
    spots = {name: [Spot(*point, "")] for name, point in at.items() if not name.startswith("sgd")}
    save(frontier(line, spots, title=f"{recipe}, width 8, CIFAR-10 (JPEG): error against time"), path)


def main() -> None:
    """Trains, and writes what is finished."""
    parser = script(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scale", default="small")
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--no-training", action="store_true", help="write the tables alone")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    results = Results(arguments.out, arguments.scale, settings=SETTINGS, data_dir=arguments.data_dir)
    recipes = [arguments.only] if arguments.only else list(METHODS)
    for seeds in () if arguments.no_training else range(1, arguments.seeds + 1):
        for recipe in recipes:
            cells = cells_of(recipe, results)
            results.refuse_others(cells, seeds)
            results.begin()
            waiting = results.missing(cells, seeds)
            train_missing(results, waiting, device=find_device(arguments.device), watcher=Log())
    for recipe in recipes:
        rows = summarise(recipe, results, arguments.seeds)
        size = results.size_notes([recipe])
        write(arguments.out / recipe, table(rows), size=size, settings=SETTINGS)
        draw(recipe, rows, arguments.out / f"{recipe}.svg")


if __name__ == "__main__":
    main()
