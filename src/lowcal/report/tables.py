"""The comparison's table: one row a method, over its seeds."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any

from lowcal.report.intervals import ABSENT, wilson, with_spread
from lowcal.report.runs import MOVING, RunData, by_method, differing

__all__ = [
    "ABSENT",
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

COLUMNS = (
    "method",
    "top-1 error, %",
    "time",
    "speed-up",
    "FLOPs",
    "peak memory",
    "memory, last epoch",
    "boundary",
    "seeds",
)


@dataclass(frozen=True)
class Row:
    """One method: means over its seeds, with sample deviations (None for one seed).

    top1_error in percent (last epoch's), seconds of training, peak_memory_bytes the highest of all seeds, and
    last_memory_bytes that of the last epoch. `test_images` are those that the error is of; `top1_error_low` and
    `top1_error_high` are its 95 % interval for so many images (Wilson), None where their number is not known.
    `speedup` and `flops_ratio` are against the sgd run of the same seed, network and images on the same device, None
    without one.
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
    last_memory_bytes: int
    test_images: int | None
    top1_error_low: float | None
    top1_error_high: float | None
    finished: bool = True

    @property
    def never_moved(self) -> bool:
        """Whether the method has a boundary, which stayed at 0 to the end, so that it trained as sgd does."""
        return self.finished and self.method in MOVING and self.boundary == 0

    @property
    def is_speedup_in_spread(self) -> bool:
        """Whether the seeds' speed-ups are so far apart that their mean says nothing."""
        if self.method == "sgd" or self.speedup is None or self.speedup_std is None:
            return False
        return abs(self.speedup - 1) <= self.speedup_std

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
    pairs = [(sgd, run) for sgd, run in pairs if sgd.machine == run.machine and not differing(sgd, run)]
    speedups = [_ratio(sgd.results["seconds"], run.results["seconds"]) for sgd, run in pairs]
    flops = [_ratio(run.results["flops"], sgd.results["flops"]) for sgd, run in pairs]
    error, test_images = _mean(errors), group[0].test_images
    low, high = wilson(error, test_images) if error is not None and test_images else (None, None)
    return Row(
        method=method,
        seeds=len(group),
        epochs=min(run.results["epochs"] for run in group),
        top1_error=error,
        top1_error_std=_deviation(errors),
        seconds=mean(seconds),
        seconds_std=_deviation(seconds),
        speedup=_mean(speedups),
        speedup_std=_deviation(speedups),
        flops_ratio=_mean(flops),
        peak_memory_bytes=max(run.results["peak_memory_bytes"] for run in group),
        boundary=mean(run.results["boundary"] for run in group),
        layers=group[0].results["layers"],
        last_memory_bytes=max(run.records[-1]["peak_memory_bytes"] for run in group),
        test_images=test_images,
        top1_error_low=low,
        top1_error_high=high,
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
            with_spread(row.top1_error, row.top1_error_std, row.seeds, 2),
            with_spread(row.seconds / scale, _scaled(row.seconds_std, scale), row.seeds, digits, f" {unit}"),
            with_spread(row.speedup, None if row.method == "sgd" else row.speedup_std, row.seeds, 2, "×"),
            with_spread(row.flops_ratio, None, row.seeds, 2, "×"),
            memory(row.peak_memory_bytes),
            memory(row.last_memory_bytes),
            f"{round(row.boundary, 1):g} of {row.layers}" if row.method in MOVING or row.boundary else ABSENT,
            str(row.seeds),
        ]
        for row in rows
    ]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value / scale


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


def memory(count: float, *, of: float | None = None) -> str:
    """Return a number of bytes for reading, in binary units: '1.21 GiB'; with `of` in the unit of that number."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if (count if of is None else of) >= 1024**power:
            value = count / 1024**power
            digits = 2 - math.floor(math.log10(value)) if value >= 1 else 2
            return f"{value:.{max(0, digits)}f} {unit}"
    return f"{count:.0f} B"
