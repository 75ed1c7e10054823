"""The comparison's table: one row a method, over its seeds."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any

from .runs import RunData, by_method

__all__ = [
    "COLUMNS",
    "Row",
    "csv_table",
    "duration",
    "escaped",
    "make_rows",
    "markdown_table",
    "memory",
    "table_cells",
    "time_unit",
]

COLUMNS = ("method", "top-1 error, %", "time", "speed-up", "FLOPs", "peak memory", "boundary", "seeds")
ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One method: means over its seeds, with sample deviations (None for one seed).

    top1_error in percent (last epoch's), seconds of training, peak_memory_bytes the highest of all seeds.
    `speedup` and `flops_ratio` are against the sgd run of the same seed on the same device, None without one.
    `finished` is False for a method of which no run is finished; its row is what the runs have so far.
    """

    method: str
    seeds: int
    epochs: int
    top1_error: float | None
    top1_error_std: float | None
    seconds: float
    seconds_std: float | None
    speedup: float | None
    speedup_std: float | None
    flops_ratio: float | None
    peak_memory_bytes: int
    boundary: float
    layers: int
    finished: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it stands in summary.json."""
        values = asdict(self)
        del values["finished"]
        return values


def make_rows(runs: Iterable[RunData]) -> list[Row]:
    """Return one row a method; where some of a method's runs are finished, the others do not count."""
    groups = {method: _counting(group) for method, group in by_method(runs).items()}
    baseline = {run.seed: run for run in groups.get("sgd", []) if run.finished}
    return [_row(method, group, baseline) for method, group in groups.items()]


def _counting(group: Sequence[RunData]) -> Sequence[RunData]:
    return [run for run in group if run.finished] or group


def _row(method: str, group: Sequence[RunData], baseline: dict[int, RunData]) -> Row:
    errors = [run.results["top1_error"] for run in group]
    seconds = [run.results["seconds"] for run in group]
    pairs = [(baseline[run.seed], run) for run in group if run.finished and run.seed in baseline]
    pairs = [(sgd, run) for sgd, run in pairs if sgd.machine == run.machine]
    speedups = [_ratio(sgd.results["seconds"], run.results["seconds"]) for sgd, run in pairs]
    flops = [_ratio(run.results["flops"], sgd.results["flops"]) for sgd, run in pairs]
    return Row(
        method=method,
        seeds=len(group),
        epochs=min(run.results["epochs"] for run in group),
        top1_error=_mean(errors),
        top1_error_std=_deviation(errors),
        seconds=mean(seconds),
        seconds_std=_deviation(seconds),
        speedup=_mean(speedups),
        speedup_std=_deviation(speedups),
        flops_ratio=_mean(flops),
        peak_memory_bytes=max(run.results["peak_memory_bytes"] for run in group),
        boundary=mean(run.results["boundary"] for run in group),
        layers=group[0].results["layers"],
        finished=all(run.finished for run in group),
    )


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 and len(known) == len(values) else None


def csv_table(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, unrounded, with summary.json's names; an unknown value is an empty field."""
    names = [field.name for field in fields(Row) if field.name != "finished"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return stream.getvalue()


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, rounded for reading."""
    cells = [[escaped(cell) for cell in line] for line in table_cells(rows)]
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it as it is, in one line; an underscore within a word needs nothing."""
    return re.sub(r"([\\`*\[\]<>|~&#!$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the rows' cells under COLUMNS, rounded for reading."""
    longest = max((row.seconds for row in rows), default=0.0)
    unit, scale = time_unit(longest)
    digits = 1 if longest / scale >= 100 else 2
    return [
        [
            row.method if row.finished else f"{row.method} (unfinished, {row.epochs} epochs)",
            _with_deviation(row.top1_error, row.top1_error_std, 2),
            _with_deviation(row.seconds / scale, row.seconds_std and row.seconds_std / scale, digits) + f" {unit}",
            _with_deviation(row.speedup, None if row.method == "sgd" else row.speedup_std, 2, "×"),
            _with_deviation(row.flops_ratio, None, 2, "×"),
            memory(row.peak_memory_bytes),
            f"{round(row.boundary, 1):g} of {row.layers}",
            str(row.seeds),
        ]
        for row in rows
    ]


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which times up to `seconds` read best, and its length in seconds."""
    if seconds < 600:
        return "s", 1.0
    if seconds < 3 * 3600:
        return "min", 60.0
    return ("h", 3600.0) if seconds < 10 * 24 * 3600 else ("days", 24 * 3600.0)


def duration(seconds: float) -> str:
    """Return a time for a sentence: '12.3 s', '14.0 min', '3.2 h', '12.5 days'."""
    unit, scale = time_unit(seconds)
    return f"{seconds / scale:.1f} {unit}"


def memory(count: float) -> str:
    """Return a number of bytes for reading, in binary units: '1.21 GiB'."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            value = count / 1024**power
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count:.0f} B"


def _with_deviation(value: float | None, deviation: float | None, digits: int, unit: str = "") -> str:
    if value is None:
        return ABSENT
    if deviation is None:
        return f"{value:.{digits}f}{unit}"
    return f"{value:.{digits}f} ± {deviation:.{digits}f}{unit}"
