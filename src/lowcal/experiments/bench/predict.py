"""What a boundary's path makes of a whole run's time: from step times measured at a few boundaries, or from FLOPs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from lowcal.schedule import NormTrend, Progress, Quadratic, Schedule, cap

WORK = {"local": 2.0, "freeze": 1.0}  # products of a layer before the boundary; one that learns by SGD has 3


def fastest_path(schedule: Schedule, *, layers: int, block: int, epochs: int, ends: tuple[int, ...] = ()) -> list[int]:
    """The boundary in each epoch if the transition layer's change halves from epoch to epoch.

    That lets Algorithm 1 move as soon as it may: every K + 1 epochs, or K with ``spacing="prose"``.

    Args:
        ends: as in `Progress`.
    """
    path: list[int] = []
    boundary = 0
    changes: tuple[float, ...] = ()
    earlier: tuple[tuple[int, float], ...] = ()
    for epoch in range(epochs):
        path.append(boundary)
        changes = (*changes, 0.5 ** len(changes))
        target = schedule(Progress(epoch + 1, epochs, layers, block, boundary, changes, ends, earlier))
        if target > boundary:
            earlier += tuple((boundary, change) for change in changes)
            boundary, changes = target, ()
    return path


def known_schedules(layers: int, epochs: int) -> dict[str, Schedule]:
    """The published dynamic schedule, and a quadratic one that rises from 0 to L_max L over the run.

    The paper gives no c1 and c2 of Eq. 3.
    """
    most = cap(layers, 0.75)
    return {"norm-trend": NormTrend(), "quadratic": Quadratic(c1=most, c2=most / epochs**2)}


def step_work(method: str, boundary: int, forward_flops: Sequence[float]) -> float:
    """Work of a step in forward passes' FLOPs: SGD 3 per layer, 2 for the first; local 2; frozen 1 (docs/method.md)."""
    sgd = [2.0, *[3.0] * (len(forward_flops) - 1)]
    factors = [WORK[method] if index < boundary else factor for index, factor in enumerate(sgd)]
    return sum(factor * flops for factor, flops in zip(factors, forward_flops, strict=True))


def predicted_speedup(
    method: str,
    path: Sequence[int],
    *,
    sgd_ms: float,
    step_ms: Mapping[int, float],
    forward_flops: Sequence[float],
) -> float:
    """Time of an SGD run over that of a run whose boundary takes `path`.

    A measured boundary has its own time. Between measured ones a step's time goes in a straight line with its work;
    beyond the last it stays.

    Args:
        step_ms: the method's step time by boundary; boundary 0 is among them.
        forward_flops: of each layer in execution order.
    """
    # Of two boundaries of equal work the later one is a neighbour of those beyond.
    known = sorted({step_work(method, each, forward_flops): step_ms[each] for each in sorted(step_ms)}.items())
    times = {boundary: _interpolate(step_work(method, boundary, forward_flops), known) for boundary in set(path)}
    times |= step_ms  # work alone cannot tell boundary 0 from 1: a local first layer has SGD's two products
    return len(path) * sgd_ms / sum(times[boundary] for boundary in path)


def flops_speedup(method: str, path: Sequence[int], forward_flops: Sequence[float]) -> float:
    """FLOPs of an SGD run over those of a run whose boundary takes `path`; `forward_flops`: of each layer in order."""
    work = {boundary: step_work(method, boundary, forward_flops) for boundary in {0, *path}}
    return len(path) * work[0] / sum(work[boundary] for boundary in path)


def _interpolate(at: float, known: Sequence[tuple[float, float]]) -> float:
    place = bisect_left(known, (at,))
    if place == 0:
        return known[0][1]
    if place == len(known):
        return known[-1][1]
    (low, before), (high, after) = known[place - 1 : place + 1]
    return before + (after - before) * (at - low) / (high - low)
