"""Measure a training step at each boundary, in turn with a plain loop and with the parts of its least time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lowcal.experiments.backends import kernels
from lowcal.experiments.bench.predict import fastest_path, known_schedules, predicted_speedup
from lowcal.experiments.bench.setup import BenchSettings, BenchSetup, TimedMethod
from lowcal.experiments.bench.timing import Timing, Work, time_in_turn, time_layers
from lowcal.files import FORMAT
from lowcal.layers import recurring_block
from lowcal.training.cost import Cost
from lowcal.training.environment import gather_environment


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
        works["compiled"] = Work(setup.compiled_plain_step())
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
