"""The rows of a table from the finished runs, and its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lowcal.experiments.reproduce.paper import Cell, PaperTable, Row
from lowcal.experiments.reproduce.results import Results
from lowcal.report.comparison import deviation, mean_or_none
from lowcal.report.runs import RunData
from lowcal.report.table import Column

APART = "not in turn"
PARTS = (25, 50, 75, 100)  # of the epochs, in percent


class Measured:
    """The finished runs of cells, with the first `seeds` seeds, beside those of the first SGD cell of their recipe.

    Attributes:
        runs: by cell.
        grows: whether the batch of any cell may grow.
    """

    def __init__(self, results: Results, cells: Iterable[Cell], seeds: int) -> None:
        self.seeds = seeds
        self.runs = {cell: results.runs(cell, seeds) for cell in cells}
        self.grows = any(results.recipe(cell).batch.grow for cell in self.runs)
        self._turns = {recipe: results.turns(recipe) for recipe in {cell.recipe for cell in self.runs}}

    def baseline(self, recipe: str) -> Cell | None:
        """The cell that speed-ups of a recipe are against."""
        return next((cell for cell in self.runs if cell.recipe == recipe and cell.method == "sgd"), None)

    def pairs(self, cell: Cell) -> list[tuple[RunData, RunData]]:
        """SGD's run and the cell's for each seed, where they are of the same machine."""
        plain = self.baseline(cell.recipe)
        by_seed = {run.seed: run for run in self.runs[plain]} if plain else {}
        pairs = [(by_seed[run.seed], run) for run in self.runs[cell] if run.seed in by_seed]
        return [(sgd, run) for sgd, run in pairs if sgd.machine == run.machine]

    def is_apart(self, cell: Cell) -> bool:
        """Whether any of the cell's runs did not take turns with SGD's, so that a drift of the machine may show."""
        pairs = [] if cell == self.baseline(cell.recipe) else self.pairs(cell)
        turns = self._turns[cell.recipe]
        return any(not any({sgd.name, run.name} <= set(folders) for folders in turns) for sgd, run in pairs)


Fields = dict[str, Any]
Kind = tuple[Sequence[Column], Callable[[PaperTable, Measured], list[Fields]]]
"""What a kind of table is: its columns, and the function that makes its rows."""


def beside_paper(key: str, heading: str, form: str, unit: str = "") -> tuple[Column, Column]:
    """The columns of the published figures, in the field paper_KEY, and of the measured ones."""
    return Column(f"paper_{key}", f"paper {heading.partition(',')[0]}", form, unit), Column(key, heading, form, unit)


BATCH = (  # empty, and so not shown, where no batch may grow
    Column("first_batch", "first batch", "number"),
    Column("last_batch", "last batch", "number"),
    Column("growth_epoch", "grown from epoch", "number"),
)
STATE = (Column("seeds", "seeds", "number"), Column("state", "state"))
RESULTS = (
    Column("strategy", "strategy"),
    *beside_paper("top1_error", "error, %", ".2f"),
    *beside_paper("speedup", "speed-up", ".2f", "×"),
    Column("boundary", "boundary", "number"),
    *BATCH,
    *STATE,
)
BOUNDARY = (
    Column("strategy", "strategy"),
    Column("layers", "layers", "number"),
    Column("first_move", "first move, epoch", "number"),
    *(Column(f"boundary_{part}", f"boundary at {part}%", "number") for part in PARTS),
    *STATE,
)
MEMORY = (
    Column("strategy", "strategy"),
    Column("first_bytes", "first epoch", "memory"),
    Column("last_bytes", "last epoch", "memory"),
    Column("paper_half_epoch", "paper: half from epoch", "number"),
    Column("half_epoch", "half from epoch", "number"),
    *BATCH,
    *STATE,
)


def measured_rows(fields: Callable[[Row, Measured], Fields], table: PaperTable, measured: Measured) -> list[Fields]:
    """A row for each of the table's, with the `fields` that are computed from its runs and how far these are."""
    rows = []
    for row in table.rows:
        count = len(measured.runs[row.cell])
        state = "not run" if not count else f"{count} of {measured.seeds} seeds" if count < measured.seeds else ""
        if fields is result and not state and measured.is_apart(row.cell):
            state = APART
        start = {"network": row.cell.recipe, "strategy": row.label, "cell": row.cell.id}
        rows.append({**start, **fields(row, measured), "seeds": count or None, "state": state})
    return rows


def result(row: Row, measured: Measured) -> Fields:
    """Error and speed-up, paper beside measured; `loss` is the error above SGD's in points."""
    runs, plain = measured.runs[row.cell], measured.baseline(row.cell.recipe)
    errors = [run.results["top1_error"] for run in runs]
    error = mean_or_none(errors)
    plain_error = mean_or_none([run.results["top1_error"] for run in measured.runs[plain]]) if plain else None
    ratios = [sgd.results["seconds"] / run.results["seconds"] for sgd, run in measured.pairs(row.cell)]
    costs = ("seconds", "flops", "boundary", "layers")
    return {
        "paper_top1_error": row.top1_error,
        "top1_error": error,
        "top1_error_std": deviation(errors),
        "paper_speedup": row.speedup,
        "speedup": mean_or_none(ratios),
        "speedup_std": None if row.cell == plain else deviation(ratios),
        "loss": None if error is None or plain_error is None else error - plain_error,
        **{cost: mean_or_none([run.results[cost] for run in runs]) for cost in costs},
        "epochs": runs[0].planned if runs else None,
        **_batches(row.cell, measured),
    }


def boundary(row: Row, measured: Measured) -> Fields:
    """How far the boundary is after parts of the training, as a mean over seeds."""
    runs = measured.runs[row.cell]
    paths = [column(run, "boundary") for run in runs]
    return {
        "layers": runs[0].results["layers"] if runs else None,
        "first_move": first_epoch(paths, lambda value, first: value > 0),
        **{
            f"boundary_{part}": mean_or_none([path[max(0, len(path) * part // 100 - 1)] for path in paths])
            for part in PARTS
        },
    }


def memory(row: Row, measured: Measured) -> Fields:
    """The peak memory of an epoch at the start and the end, and the first epoch with at most half of the first's."""
    paths = [column(run, "peak_memory_bytes") for run in measured.runs[row.cell]]
    return {
        "first_bytes": mean_or_none([path[0] for path in paths]),
        "last_bytes": mean_or_none([path[-1] for path in paths]),
        "paper_half_epoch": row.epochs,
        "half_epoch": first_epoch(paths, lambda value, first: value <= first / 2),
        **_batches(row.cell, measured),
    }


def _batches(cell: Cell, measured: Measured) -> Fields:
    """The batch at the start and the end, and the first epoch with a larger one; nothing where none may grow."""
    if not measured.grows:
        return {}
    paths = [column(run, "batch") for run in measured.runs[cell]]
    return {
        "first_batch": mean_or_none([path[0] for path in paths]),
        "last_batch": mean_or_none([path[-1] for path in paths]),
        "growth_epoch": first_epoch(paths, lambda value, first: value > first),
    }


def column(run: RunData, key: str) -> list[Any]:
    """The values of one field from epoch to epoch."""
    return [record[key] for record in run.records]


def first_epoch(paths: Sequence[Sequence[float]], holds: Callable[[float, float], bool]) -> float | None:
    """The mean over runs of the first epoch whose value satisfies `holds(value, first value)`."""
    return mean_or_none([next((n for n, at in enumerate(path, 1) if holds(at, path[0])), None) for path in paths])


KINDS: dict[str, Kind] = {
    "results": (RESULTS, partial(measured_rows, result)),
    "boundary": (BOUNDARY, partial(measured_rows, boundary)),
    "memory": (MEMORY, partial(measured_rows, memory)),
}
