"""The rows of each kind of table, from the finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from lowcal.experiments.reproduction.cells import Cell
from lowcal.experiments.reproduction.plans import Line, Plan
from lowcal.experiments.reproduction.results import Results
from lowcal.report.runs import RunData
from lowcal.report.table import Column

Row = dict[str, Any]

APART = "not in turn"


def beside_paper(key: str, heading: str, form: str, unit: str = "") -> tuple[Column, Column]:
    """The columns of the published figures, in the field paper_KEY, and of the measured ones."""
    return Column(f"paper_{key}", f"paper {heading.partition(',')[0]}", form, unit), Column(key, heading, form, unit)


BATCH = (  # empty, and so not shown, where no batch may grow
    Column("first_batch", "first batch", "number"),
    Column("last_batch", "last batch", "number"),
    Column("growth_epoch", "grown from epoch", "number"),
)
RESULTS = (
    Column("strategy", "strategy"),
    *beside_paper("top1_error", "error, %", ".2f"),
    *beside_paper("speedup", "speed-up", ".2f", "×"),
    Column("boundary", "boundary", "number"),
    *BATCH,
    Column("seeds", "seeds", "number"),
    Column("state", "state"),
)
BOUNDARY = (
    Column("strategy", "strategy"),
    Column("layers", "layers", "number"),
    Column("first_move", "first move, epoch", "number"),
    *(Column(f"boundary_{part}", f"boundary at {part}%", "number") for part in (25, 50, 75, 100)),
    Column("seeds", "seeds", "number"),
    Column("state", "state"),
)
MEMORY = (
    Column("strategy", "strategy"),
    Column("first_bytes", "first epoch", "memory"),
    Column("last_bytes", "last epoch", "memory"),
    Column("paper_half_epoch", "paper: half from epoch", "number"),
    Column("half_epoch", "half from epoch", "number"),
    *BATCH,
    Column("seeds", "seeds", "number"),
    Column("state", "state"),
)


def result_rows(plan: Plan, results: Results, seeds: int) -> list[Row]:
    """Error and speed-up of each line, paper beside measured; `loss` is the error above SGD's in points."""
    apart = lines_apart(plan, results, seeds)
    rows = []
    for line in plan.lines:
        runs = runs_of(line.cell, results, seeds)
        baseline = _baseline(plan, line.recipe)
        plain = runs_of(baseline, results, seeds)
        error = mean_or_none([run.results["top1_error"] for run in runs])
        plain_error = mean_or_none([run.results["top1_error"] for run in plain])
        ratios = _speedups(plain, runs)
        rows.append(
            _start(line)
            | {
                "paper_top1_error": line.paper.top1_error,
                "top1_error": error,
                "top1_error_std": deviation([run.results["top1_error"] for run in runs]),
                "paper_speedup": line.paper.speedup,
                "speedup": mean_or_none(ratios),
                "speedup_std": None if line.cell == baseline else deviation(ratios),
                "loss": None if error is None or plain_error is None else error - plain_error,
                "seconds": mean_or_none([run.results["seconds"] for run in runs]),
                "flops": mean_or_none([run.results["flops"] for run in runs]),
                "boundary": mean_or_none([run.results["boundary"] for run in runs]),
                "layers": runs[0].results["layers"] if runs else None,
                "epochs": runs[0].planned if runs else None,
            }
            | _batches(plan, results, runs)
            | _end(runs, seeds)
        )
        if not rows[-1]["state"] and line in apart:
            rows[-1]["state"] = APART
    return rows


def boundary_rows(plan: Plan, results: Results, seeds: int) -> list[Row]:
    """How far the boundary is after parts of the training, as a mean over seeds."""
    rows = []
    for line in plan.lines:
        runs = runs_of(line.cell, results, seeds)
        paths = [[record["boundary"] for record in run.records] for run in runs]
        row = _start(line) | {"layers": runs[0].results["layers"] if runs else None}
        moves = [next((epoch for epoch, at in enumerate(path, 1) if at > 0), None) for path in paths]
        row["first_move"] = mean_or_none(moves)
        for part in (25, 50, 75, 100):
            row[f"boundary_{part}"] = mean_or_none([path[max(0, len(path) * part // 100 - 1)] for path in paths])
        rows.append(row | _end(runs, seeds))
    return rows


def memory_rows(plan: Plan, results: Results, seeds: int, *, paper_half_epoch: int) -> list[Row]:
    """The peak memory of an epoch at the start and the end, and the first epoch with at most half of the first's."""
    rows = []
    for line in plan.lines:
        runs = runs_of(line.cell, results, seeds)
        paths = [[record["peak_memory_bytes"] for record in run.records] for run in runs]
        halves = [next((epoch for epoch, at in enumerate(path, 1) if at <= path[0] / 2), None) for path in paths]
        rows.append(
            _start(line)
            | {
                "first_bytes": mean_or_none([path[0] for path in paths]),
                "last_bytes": mean_or_none([path[-1] for path in paths]),
                "paper_half_epoch": paper_half_epoch if line.cell.method == "local" else None,
                "half_epoch": mean_or_none(halves),
            }
            | _batches(plan, results, runs)
            | _end(runs, seeds)
        )
    return rows


def _batches(plan: Plan, results: Results, runs: Sequence[RunData]) -> Row:
    """The batch at the start and the end, and the first epoch with a larger one; nothing where none may grow."""
    if not any(results.recipe(cell).batch.grow for cell in plan.cells):
        return {}
    paths = [[record["batch"] for record in run.records] for run in runs]
    grown = [next((epoch for epoch, at in enumerate(path, 1) if at > path[0]), None) for path in paths]
    return {
        "first_batch": mean_or_none([path[0] for path in paths]),
        "last_batch": mean_or_none([path[-1] for path in paths]),
        "growth_epoch": mean_or_none(grown),
    }


def runs_of(cell: Cell | None, results: Results, seeds: int) -> list[RunData]:
    """The finished runs of a cell; none for none."""
    return results.complete(cell, seeds) if cell else []


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None for no values or where one is unknown."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def deviation(values: Sequence[float | None]) -> float | None:
    """The sample deviation; None for fewer than two values or where one is unknown."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 and len(known) == len(values) else None


def lines_apart(plan: Plan, results: Results, seeds: int) -> list[Line]:
    """The lines whose times and SGD's are of runs of different calls, so that a drift of the machine may show."""
    lines = ((line, _baseline(plan, line.recipe)) for line in plan.lines)
    return [line for line, plain in lines if plain and is_apart(line.cell, plain, results, seeds)]


def is_apart(cell: Cell, plain: Cell, results: Results, seeds: int) -> bool:
    """Whether any of the cell's runs did not take turns with those of `plain`, SGD's."""
    if cell == plain:
        return False
    pairs = _pairs(runs_of(plain, results, seeds), runs_of(cell, results, seeds))
    return any(not results.took_turns(cell.recipe, one.name, other.name) for one, other in pairs)


def _baseline(plan: Plan, recipe: str) -> Cell | None:
    return next((cell for cell in plan.cells if cell.recipe == recipe and cell.method == "sgd"), None)


def _pairs(plain: Sequence[RunData], runs: Sequence[RunData]) -> list[tuple[RunData, RunData]]:
    by_seed = {run.seed: run for run in plain}
    pairs = [(by_seed[run.seed], run) for run in runs if run.seed in by_seed]
    return [(one, other) for one, other in pairs if one.machine == other.machine]


def _speedups(plain: Sequence[RunData], runs: Sequence[RunData]) -> list[float]:
    return [one.results["seconds"] / other.results["seconds"] for one, other in _pairs(plain, runs)]


def _start(line: Line) -> Row:
    return {"network": line.recipe, "strategy": line.strategy, "cell": line.cell.id}


def _end(runs: Sequence[RunData], seeds: int) -> Row:
    if not runs:
        state = "not run"
    else:
        state = f"{len(runs)} of {seeds} seeds" if len(runs) < seeds else ""
    return {"seeds": len(runs) or None, "state": state}
