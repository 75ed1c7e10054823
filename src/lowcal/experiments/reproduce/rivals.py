"""Methods at equal accuracy (Table 6) and at equal time (Table 7), with SGD in less time as the rival."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from lowcal.experiments.reproduce.paper import PaperTable, Row
from lowcal.experiments.reproduce.rows import APART, Fields, Kind, Measured, beside_paper
from lowcal.report.runs import COMPRESSED, RunData
from lowcal.report.table import Column

SHORT_STEP = "local-step-0.0003"
LABELS = {"sgd": "sgd, stopped early", COMPRESSED: "sgd, compressed", "refresh": "refresh (ours)"}

EQUAL_ACCURACY = (
    Column("strategy", "strategy"),
    *beside_paper("epochs", "epochs", "number"),
    *beside_paper("top1_error", "error, %", ".2f"),
    *beside_paper("speedup", "speed-up", ".2f", "×"),
    Column("state", "state"),
)
EQUAL_TIME = (
    Column("max_loss", "at most", ".2f"),
    *beside_paper("local_loss", "local", ".2f"),
    *beside_paper("freeze_loss", "freeze", ".2f"),
    Column("refresh_loss", "refresh", ".2f"),
    Column("short_step_loss", "short step", ".2f"),
    Column("stopped_loss", "sgd stopped", ".2f"),
    Column("compressed_loss", "compressed", ".2f"),
    Column("speedup", "speed-up", ".2f", "×"),
    Column("setting", "local's setting"),
    Column("state", "state"),
)


class Point(NamedTuple):
    """After `seconds` of training, in `epochs` epochs, the top-1 error in percent; between runs fractions of epochs."""

    seconds: float
    epochs: float
    error: float


Curve = Sequence[Point]


def curves(recipe: str, measured: Measured) -> dict[str, Curve]:
    """Error against time of a recipe's cells, by name: means over the runs on the machine of SGD's."""
    runs = {cell.name: own for cell, own in measured.runs.items() if cell.recipe == recipe and own}
    if "sgd" in runs:
        machine = runs["sgd"][0].machine
        runs = {name: [run for run in own if run.machine == machine] for name, own in runs.items()}
    return {name: _curve(own) for name, own in runs.items() if own}


def _curve(runs: Sequence[RunData]) -> Curve:
    return [
        Point(mean(record["total_seconds"] for record in at), epochs, mean(record["top1_error"] for record in at))
        for epochs, at in enumerate(zip(*(run.records for run in runs), strict=True), start=1)
    ]


def compressed_line(found: dict[str, Curve]) -> Curve:
    """The ends of SGD's runs of different lengths in the order of their times; empty for fewer than two."""
    line = sorted(points[-1] for name, points in found.items() if name == "sgd" or name.startswith(COMPRESSED))
    return line if len(line) > 1 else []


def first_within(points: Curve, error: float) -> Point | None:
    """The first point with at most `error`; None if there is none."""
    return next((point for point in points if point.error <= error), None)


def line_within(line: Curve, error: float) -> Point | None:
    """Where straight lines between points first have at most `error`; None if they never have."""
    if line and line[0].error <= error:
        return line[0]
    for before, after in pairwise(line):
        if after.error <= error:
            return _between(before, after, (before.error - error) / (before.error - after.error))
    return None


def stopped_at(points: Curve, seconds: float) -> Point | None:
    """The last point that takes no longer than `seconds`: a run broken off; None if all take longer."""
    within = [point for point in points if point.seconds <= seconds]
    return within[-1] if within else None


def line_at(line: Curve, seconds: float) -> Point | None:
    """Where straight lines between points are after `seconds`: the last point later on, None before the first one."""
    before = stopped_at(line, seconds)
    after = next((point for point in line if point.seconds > seconds), None)
    if before is None or after is None:
        return before
    return _between(before, after, (seconds - before.seconds) / (after.seconds - before.seconds))


def _between(one: Point, other: Point, part: float) -> Point:
    return Point(*(a + part * (b - a) for a, b in zip(one, other, strict=True)))


def equal_accuracy_rows(table: PaperTable, measured: Measured) -> list[Fields]:
    """Table 6: epochs and time until each first has the lowest error of local, and the speed-up over SGD stopped."""
    return [fields for recipe in table.recipes for fields in _equal_accuracy(recipe, table, measured)]


def _equal_accuracy(recipe: str, table: PaperTable, measured: Measured) -> list[Fields]:
    own = {row.cell.name: row for row in table.rows if row.cell.recipe == recipe}
    found = curves(recipe, measured)
    line = compressed_line(found)
    target = min(point.error for point in found["local"]) if "local" in found else None
    reached: dict[str, Point | None] = {}
    if target is not None:
        reached = {name: first_within(points, target) for name, points in found.items()}
        if line:
            reached[COMPRESSED] = line_within(line, target)
    against = reached.get("sgd")
    rows = []
    for name in ("sgd", COMPRESSED, "local", "freeze", "refresh"):
        point = reached.get(name)
        if name not in reached:
            state = "not run"
        elif point is None:
            state = "never as good"
        else:
            state = APART * any(
                measured.is_apart(row.cell)
                for other, row in own.items()
                if other == name or (name == COMPRESSED and other.startswith(name))
            )
        known: Row | None = own.get(name)
        rows.append(
            {
                "network": recipe,
                "strategy": LABELS.get(name, name),
                "paper_epochs": known and known.epochs,
                "epochs": point and point.epochs,
                "paper_top1_error": known and known.top1_error,
                "top1_error": point and point.error,
                "paper_speedup": known and known.speedup,
                "speedup": against.seconds / point.seconds if against and point else None,
                "seconds": point and point.seconds,
                "state": state,
            }
        )
    return rows


def equal_time_rows(table: PaperTable, measured: Measured) -> list[Fields]:
    """Table 7: error above SGD's of local's fastest setting within a bound, and of its rivals in the same time."""
    (recipe,) = table.recipes
    found = curves(recipe, measured)
    apart = [row.cell.name for row in table.rows if measured.is_apart(row.cell)]
    rows = []
    for bound in table.bounds:
        fields = _equal_time(found, bound["max_loss"])
        if not fields["state"] and fields["setting"] in apart:
            fields["state"] = APART
        rows.append({"network": recipe, **bound, **fields})
    return rows


def _equal_time(found: dict[str, Curve], bound: float) -> Fields:
    def of(method: str) -> dict[str, Point]:
        """The ends of a method's runs, all settings but ours."""
        named = {name: points[-1] for name, points in found.items() if f"{name}-".startswith(f"{method}-")}
        return {name: end for name, end in named.items() if name != SHORT_STEP}

    def lowest(ends: dict[str, Point]) -> Point | None:
        return min(
            (end for end in ends.values() if end.seconds <= time),
            key=lambda end: (end.error, end.seconds),
            default=None,
        )

    ends = of("local")
    if "sgd" not in found or not ends:
        return {"state": "not run"}
    plain = found["sgd"]
    base = plain[-1].error
    within = {name: end for name, end in ends.items() if end.error - base <= bound}
    if within:
        setting = min(within, key=lambda name: within[name].seconds)
    else:
        setting = min(ends, key=lambda name: (ends[name].error, ends[name].seconds))
    time = ends[setting].seconds
    rivals = {
        "stopped": stopped_at(plain, time),
        "compressed": line_at(compressed_line(found), time),
        "freeze": lowest(of("freeze")),
        "refresh": lowest(of("refresh")),
        "short_step": lowest({SHORT_STEP: found[SHORT_STEP][-1]} if SHORT_STEP in found else {}),
    }
    return {
        "local_loss": ends[setting].error - base,
        **{f"{rival}_loss": point.error - base if point else None for rival, point in rivals.items()},
        "speedup": plain[-1].seconds / time,
        "seconds": time,
        "setting": setting,
        "state": "" if within else "none within",
    }


KINDS: dict[str, Kind] = {
    "equal-accuracy": (EQUAL_ACCURACY, equal_accuracy_rows),
    "equal-time": (EQUAL_TIME, equal_time_rows),
}
