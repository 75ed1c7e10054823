"""Predict the speed-up of a whole run from its boundary's path: by step times at a few boundaries, or by FLOPs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from lowcal.schedule import NormTrend, Progress, Quadratic, Schedule, cap

WORK = {"local": 2.0, "freeze": 1.0}  # products of a layer before the boundary; one that learns by SGD has 3


def fastest_path(schedule: Schedule, *, layers: int, block: int, epochs: int, ends: tuple[int, ...] = ()) -> list[int]:
    """Return the boundary in each epoch if the transition layer's change halves every epoch.

    Algorithm 1 then moves as early as it can: every K + 1 epochs, or K with ``spacing="prose"``.

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
    """Return the published dynamic schedule, and a quadratic one that rises from 0 to L_max L over the run.

    The paper does not give c1 and c2 of Eq. 3.
    """
    most = cap(layers, 0.75)
    return {"norm-trend": NormTrend(), "quadratic": Quadratic(c1=most, c2=most / epochs**2)}


def step_work(method: str, boundary: int, forward_flops: Sequence[float]) -> float:
    """Return the FLOPs of a step: per layer 3 forward passes for SGD (first: 2), 2 for local, 1 for frozen."""
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
    """Return the time of an SGD run over that of a run whose boundary takes `path`.

    A measured boundary has its own time. Between measured boundaries the time is interpolated linearly in the work of
    a step; beyond the last one it is constant.

    Args:
        step_ms: the method's step time by boundary; boundary 0 is among them.
        forward_flops: of each layer in execution order.
    """
    # Of two boundaries with equal work, the later one is used for interpolation beyond it.
    known = sorted({step_work(method, each, forward_flops): step_ms[each] for each in sorted(step_ms)}.items())
    times = {boundary: _interpolate(step_work(method, boundary, forward_flops), known) for boundary in set(path)}
    times |= step_ms  # work alone cannot tell boundary 0 from 1: a local first layer has SGD's two products
    return len(path) * sgd_ms / sum(times[boundary] for boundary in path)


def flops_speedup(method: str, path: Sequence[int], forward_flops: Sequence[float]) -> float:
    """Return the FLOPs of an SGD run over those of a run whose boundary takes `path`."""
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
