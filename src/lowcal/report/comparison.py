"""Compare methods: one row per method, over its seeds, and the table of all rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from statistics import mean, stdev
from typing import Any

from lowcal.report.runs import COMPRESSED, MOVING, SAME_TIME, RunData, by_method, differing
from lowcal.report.table import ABSENT, Column, Table, time_unit, with_spread

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Row:
    """One method: means over its seeds, with sample deviations (None for one seed).

    Attributes:
        top1_error: of the last epoch, in percent, on `test_images` images; `top1_error_low` and `top1_error_high` are
            its 95 % interval (Wilson), None if the number of images is not known.
        seconds: of training.
        speedup: against the sgd run with the same seed, network and images on the same device; None without one.
            So is `flops_ratio`.
        peak_memory_bytes: the highest of all seeds; `last_memory_bytes` is that of the last epoch.
        errors: top1_error by seed, in percent.
        finished: False if no run of the method is finished; the row then has the results so far.
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
    errors: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_rival(self) -> bool:
        """Whether this is SGD with its schedule compressed to the time of another method."""
        return self.method.startswith(COMPRESSED)

    @property
    def never_moved(self) -> bool:
        """Whether the method has a boundary that stayed at 0, so that it trained as sgd does."""
        return self.finished and self.method in MOVING and self.boundary == 0

    @property
    def is_speedup_in_spread(self) -> bool:
        """Whether the speed-up differs from 1 by no more than the deviation over seeds."""
        if self.method == "sgd" or self.speedup is None or self.speedup_std is None:
            return False
        return abs(self.speedup - 1) <= self.speedup_std

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it stands in summary.json."""
        values = asdict(self)
        del values["finished"], values["errors"]
        return values


def make_rows(runs: Iterable[RunData]) -> list[Row]:
    """Return one row per method, from its finished runs, or from all of them if none is finished."""
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
    error, test_images = mean_or_none(errors), group[0].test_images
    low, high = wilson(error, test_images) if error is not None and test_images else (None, None)
    return Row(
        method=method,
        seeds=len(group),
        epochs=min(run.results["epochs"] for run in group),
        top1_error=error,
        top1_error_std=deviation(errors),
        seconds=mean(seconds),
        seconds_std=deviation(seconds),
        speedup=mean_or_none(speedups),
        speedup_std=deviation(speedups),
        flops_ratio=mean_or_none(flops),
        peak_memory_bytes=max(run.results["peak_memory_bytes"] for run in group),
        boundary=mean(run.results["boundary"] for run in group),
        layers=group[0].results["layers"],
        last_memory_bytes=max(run.records[-1]["peak_memory_bytes"] for run in group),
        test_images=test_images,
        top1_error_low=low,
        top1_error_high=high,
        finished=all(run.finished for run in group),
        errors={run.seed: run.results["top1_error"] for run in group if run.results["top1_error"] is not None},
    )


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean; None for no values or where one is unknown."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def deviation(values: Sequence[float | None]) -> float | None:
    """Return the sample deviation; None for fewer than two values or where one is unknown."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 and len(known) == len(values) else None


def comparison_table(
    rows: Sequence[Row], title: str = "", *, lead: Sequence[str] = (), notes: Sequence[str] = ()
) -> Table:
    """Return the rows as a table, with all times in one unit."""
    longest = max((row.seconds for row in rows), default=0.0)
    unit, scale = time_unit(longest)
    columns = (
        Column("method", "method", lambda row: labels[row["method"]], left=True),
        Column("top1_error", "top-1 error, %", ".2f"),
        Column("seconds", "time", ".1f" if longest / scale >= 100 else ".2f", f" {unit}", scale),
        Column("speedup", "speed-up", _speedup),
        Column("flops_ratio", "FLOPs", ".2f", "×"),
        Column("peak_memory_bytes", "peak memory", "memory"),
        Column("last_memory_bytes", "memory, last epoch", "memory"),
        Column("boundary", "boundary", _boundary),
        Column("seeds", "seeds", "number"),
    )
    labels = {
        row.method: row.method if row.finished else f"{row.method} (unfinished, {row.epochs} epochs)" for row in rows
    }
    return Table(columns, [row.as_dict() for row in rows], title, lead, notes)


def _speedup(row: Mapping[str, Any]) -> str:
    deviation = None if row["method"] == "sgd" else row["speedup_std"]
    return with_spread(row["speedup"], deviation, row["seeds"], unit="×")


def _boundary(row: Mapping[str, Any]) -> str:
    if row["method"] not in MOVING and not row["boundary"]:
        return ABSENT
    return f"{round(row['boundary'], 1):g} of {row['layers']}"


def rival_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return SGD with the fewest epochs that took the time of `row`, or else the longest; None without one."""
    rivals = sorted((other for other in rows if other.is_rival and other.finished), key=lambda other: other.seconds)
    return next((other for other in rivals if other.seconds >= SAME_TIME * row.seconds), rivals[-1] if rivals else None)


def paired_p(one: Row, other: Row) -> float | None:
    """Return the two-sided p of a paired t-test over seeds (Student 1908); None if it cannot be made."""
    from scipy.stats import ttest_rel  # type: ignore[import-untyped]  # comes with scikit-learn

    seeds = sorted(one.errors.keys() & other.errors.keys())
    differences = {one.errors[seed] - other.errors[seed] for seed in seeds}
    if len(seeds) < 2 or len(differences) < 2:
        return None
    return float(ttest_rel([one.errors[seed] for seed in seeds], [other.errors[seed] for seed in seeds]).pvalue)


def wilson(error: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of an error (percent) that was measured on `images` images (Wilson 1927)."""
    share, width = error / 100, _Z**2 / images
    middle = (share + width / 2) / (1 + width)
    reach = sqrt(width * share * (1 - share) + width**2 / 4) / (1 + width)
    return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def difference_interval(error: float, baseline: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of `error` - `baseline` in points, each on `images` images (Newcombe 1998, method 10).

    It assumes independent errors, so for errors on the same images it is too wide.
    """
    low, high = wilson(error, images)
    base_low, base_high = wilson(baseline, images)
    difference = error - baseline
    return (
        difference - sqrt((error - low) ** 2 + (base_high - baseline) ** 2),
        difference + sqrt((high - error) ** 2 + (baseline - base_low) ** 2),
    )
