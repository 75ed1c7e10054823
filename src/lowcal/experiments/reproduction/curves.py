"""What error-against-time curves say of methods at equal accuracy and at equal time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from lowcal.report.runs import RunData


@dataclass(frozen=True)
class Point:
    """After `epochs` epochs and `seconds` of training, the top-1 error in percent; between runs fractions of one."""

    epochs: float
    seconds: float
    error: float


Curve = Sequence[Point]


def curve(runs: Sequence[RunData]) -> list[Point]:
    """The mean over seeds of error and time after each epoch."""
    return [
        Point(
            index + 1,
            mean(record["total_seconds"] for record in records),
            mean(record["top1_error"] for record in records),
        )
        for index, records in enumerate(zip(*(run.records for run in runs), strict=True))
    ]


def lowest(points: Curve) -> Point:
    """The first point with the lowest error."""
    return min(points, key=lambda point: (point.error, point.seconds))


def first_within(points: Curve, error: float) -> Point | None:
    """The first point with at most `error`; None if there is none."""
    return next((point for point in points if point.error <= error), None)


def stopped_at(points: Curve, seconds: float) -> Point | None:
    """The last point that takes no longer than `seconds`: a run broken off."""
    within = [point for point in points if point.seconds <= seconds]
    return within[-1] if within else None


def frontier(ends: Iterable[Point]) -> list[Point]:
    """The ends of runs of different lengths in the order of their times: a line to beat."""
    return sorted(ends, key=lambda point: point.seconds)


def line_within(line: Curve, error: float) -> Point | None:
    """Where a line between ends of runs first has at most `error`; None if it never has."""
    before: Point | None = None
    for point in line:
        if point.error <= error:
            if before is None:
                return point
            return _between(before, point, (before.error - error) / (before.error - point.error))
        before = point
    return None


def line_at(line: Curve, seconds: float) -> Point | None:
    """Where a line between ends of runs is after `seconds`; its last end later on, None before its first one."""
    place = bisect_left([point.seconds for point in line], seconds)
    if place == len(line):
        return line[-1] if line else None
    if line[place].seconds == seconds:
        return line[place]
    if place == 0:
        return None
    before, after = line[place - 1], line[place]
    return _between(before, after, (seconds - before.seconds) / (after.seconds - before.seconds))


def _between(one: Point, other: Point, part: float) -> Point:
    return Point(
        one.epochs + part * (other.epochs - one.epochs),
        one.seconds + part * (other.seconds - one.seconds),
        one.error + part * (other.error - one.error),
    )
