"""Measure a training step at each boundary, and predict the speed-up of whole runs from a boundary's path."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lowcal.experiments.backends import kernels
from lowcal.experiments.bench.setup import BenchSettings, BenchSetup, TimedMethod
from lowcal.experiments.bench.timing import Timing, Work, time_in_turn, time_layers
from lowcal.files import FORMAT
from lowcal.layers import recurring_block
from lowcal.schedule import NormTrend, Progress, Quadratic, Schedule, cap
from lowcal.training.cost import Cost
from lowcal.training.environment import gather_environment

WORK = {"local": 2.0, "freeze": 1.0}  # products of a layer before the boundary; one that learns by SGD has 3


def bench(settings: BenchSettings, device: torch.device, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure the steps of sgd, local and freeze, the plain loop and the parts of the limits, all in turn.

    Args:
        note: is called with a line on what is measured next.

    Returns:
        Plain values, the content of `bench --json`:

        - `layers`: L, the number of the network's layers;
        - `plain_step_ms`: a hand-written loop with the same settings; its quartiles follow;
        - `compiled_step_ms`: that loop with its network under torch.compile in the mode `compile_mode`; null if it was
          not measured;
        - `rows`: one for each method and boundary, see `_row`;
        - `parts_ms`: by boundary, the medians of the parts of the limit;
        - `moves_ms`: by boundary, the time of a move from 0, with the new step;
        - `predictions`: the speed-up of whole runs under a schedule, from these step times;
        - `layer_times`: see `time_layers`.

    Raises:
        LowcalError: the network, precision or step is unknown, the network does not take such images, or torch cannot
            compile it.
    """
    with kernels(tf32=settings.tf32):
        return _bench(settings, device, note)


def _bench(settings: BenchSettings, device: torch.device, note: Callable[[str], None]) -> dict[str, Any]:
    setup = BenchSetup(settings, device)
    settings = setup.settings
    depth = len(setup.order.layers)
    note(f"{settings.model}: {depth} layers; building")
    methods = setup.methods()
    parts = {boundary: setup.parts(boundary) for boundary in setup.boundaries}
    costs = {name: timed.cost() for name, timed in methods.items()}
    works = {"plain": Work(setup.plain_step()), **{name: timed.work() for name, timed in methods.items()}}
    if settings.compile:
        note(f"compiling the plain loop, {setup.compile_mode}")
        works["compiled"] = Work(setup.compiled_plain_step(setup.compile_mode))
    for boundary, part in parts.items():
        works |= {f"{name} {boundary}": work for name, work in part.items()}
    note(f"timing {len(works)} pieces of work in turn, {settings.warm_up} + {settings.rounds} rounds")
    times = time_in_turn(works, rounds=settings.rounds, warm_up=settings.warm_up, runs=settings.runs, device=device)
    peaks = {name: timed.peak(costs[name].peak_bytes) for name, timed in methods.items()}
    part_ms = {
        boundary: {name: times[f"{name} {boundary}"].median for name in part} for boundary, part in parts.items()
    }
    rows = [
        _row(name, timed, times, costs, peaks[name], part_ms.get(timed.method.boundary))
        for name, timed in methods.items()
    ]
    layer_times: list[dict[str, Any]] = []
    if settings.layers:
        note(f"timing {depth} layers one by one")
        layer_times = time_layers(
            setup.model,
            setup.images,
            precision=settings.precision,
            rounds=max(5, settings.rounds // 2),
            warm_up=settings.warm_up,
            runs=settings.runs,
        )
    environment = gather_environment(str(device))
    return {
        "format": FORMAT,
        "device": environment["device"],
        "torch": environment["torch"],
        "model": settings.model,
        "batch": settings.batch,
        "image_size": settings.image_size,
        "precision": settings.precision,
        "layers": depth,
        **times["plain"].fields("plain_step_ms"),
        **dict.fromkeys(("compiled_step_ms", "compiled_step_ms_q25", "compiled_step_ms_q75")),
        **(times["compiled"].fields("compiled_step_ms") if settings.compile else {}),
        "compile_mode": setup.compile_mode if settings.compile else None,
        "rows": rows,
        "parts_ms": part_ms,
        "moves_ms": {timed.method.boundary: timed.move_ms for timed in methods.values() if timed.label == "local"},
        "predictions": _predictions(setup, rows),
        "layer_times": layer_times,
        "settings": asdict(settings),
        "environment": environment,
    }


def _row(
    name: str,
    timed: TimedMethod,
    times: Mapping[str, Timing],
    costs: Mapping[str, Cost],
    peak: int,
    parts: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return the figures of one method at one boundary.

    `method` "local/n" makes a local update every n steps; its figures are means over n steps. `speedup` is the time
    of the sgd row over this one's, `ideal` the same for FLOPs. `limit_ms` is the sum of the parts that cannot be
    avoided, at boundary 0 the plain loop; `efficiency` is limit_ms / step_ms.
    """
    time, sgd = times[name], times["sgd 0"]
    limit = times["plain"].median
    if parts is not None:
        limit = parts["prefix"] + parts["suffix"]
        if timed.label != "freeze":
            limit += parts["products"] / timed.method.period
    return {
        "method": timed.label,
        "boundary": timed.method.boundary,
        **time.fields("step_ms"),
        "flops": costs[name].flops,
        "speedup": sgd.median / time.median,
        "ideal": costs["sgd 0"].flops / costs[name].flops,
        "limit_ms": limit,
        "efficiency": limit / time.median,
        "peak_memory_bytes": peak,
    }


def _predictions(setup: BenchSetup, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the speed-up of whole runs under each schedule, for local and freeze."""
    depth, epochs = len(setup.order.layers), setup.settings.epochs
    block = recurring_block(setup.model, setup.order.layers)
    predictions = []
    for name, schedule in known_schedules(depth, epochs).items():
        path = fastest_path(schedule, layers=depth, block=block, epochs=epochs)
        for method in ("local", "freeze"):
            step_ms = {row["boundary"]: row["step_ms"] for row in rows if row["method"] == method}
            step_ms[0] = rows[1]["step_ms"]  # at boundary 0, local and freeze are the same
            speedup = predicted_speedup(
                method, path, sgd_ms=rows[0]["step_ms"], step_ms=step_ms, forward_flops=setup.forward_flops
            )
            whole = {"schedule": name, "method": method, "epochs": epochs, "mean_boundary": sum(path) / len(path)}
            predictions.append(whole | {"speedup": speedup})
    return predictions


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
