"""`lowcal bench`: what a training step costs at each boundary, and how near that is to the least that it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lowcal.experiments.backends import kernels
from lowcal.experiments.bench_settings import BenchSettings
from lowcal.experiments.layer_times import LayerTime, time_layers
from lowcal.experiments.predict import fastest_path, known_schedules, predicted_speedup
from lowcal.experiments.timing import Timing, Work, take_turns
from lowcal.experiments.workshop import Arm, Workshop
from lowcal.layers import recurring_block
from lowcal.training.cost import Cost
from lowcal.training.environment import gather_environment


@dataclass(frozen=True)
class Row:
    """One method at one boundary.

    Attributes:
        method: "local/n" makes local updates in every n-th step; its figures are means over n steps.
        flops: of one step.
        speedup: the time of the sgd row over this one's.
        ideal: the FLOPs of the sgd row over this one's.
        limit_ms: the sum of the parts that cannot be avoided; at boundary 0 that is the plain loop.
        efficiency: limit_ms / step_ms.
    """

    method: str
    boundary: int
    step_ms: float
    step_ms_q25: float
    step_ms_q75: float
    flops: int
    speedup: float
    ideal: float
    limit_ms: float
    efficiency: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Prediction:
    """The speed-up of a whole run under a schedule, from the measured step times."""

    schedule: str
    method: str
    epochs: int
    mean_boundary: float
    speedup: float


@dataclass(frozen=True)
class BenchResult:
    """All that was measured.

    Attributes:
        layers: L, the network's layers.
        plain_step_ms: a hand-written loop of the same settings; its quartiles follow.
        parts: by boundary, the medians of the parts of the limit.
        moves_ms: by boundary, what a move there from 0 takes, the new step included.
    """

    environment: dict[str, Any]
    settings: BenchSettings
    layers: int
    plain: Timing
    rows: tuple[Row, ...]
    parts: dict[int, dict[str, float]]
    moves_ms: dict[int, float]
    predictions: tuple[Prediction, ...]
    layer_times: tuple[LayerTime, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        settings = self.settings
        return {
            "format": 1,
            "device": self.environment["device"],
            "torch": self.environment["torch"],
            "model": settings.model,
            "batch": settings.batch,
            "image_size": settings.image_size,
            "precision": settings.precision,
            "layers": self.layers,
            "plain_step_ms": self.plain.median,
            "plain_step_ms_q25": self.plain.q25,
            "plain_step_ms_q75": self.plain.q75,
            "rows": [asdict(row) for row in self.rows],
            "parts_ms": self.parts,
            "moves_ms": self.moves_ms,
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "layer_times": [asdict(time) for time in self.layer_times],
            "settings": asdict(settings),
            "environment": self.environment,
        }


def bench(settings: BenchSettings, device: torch.device, note: Callable[[str], None]) -> BenchResult:
    """Measures the steps of sgd, local and freeze, the plain loop and the limits, all of them in turn.

    Args:
        note: is told what goes on.

    Raises:
        LowcalError: there is no such network, precision or step, or the network does not take such images.
    """
    with kernels(tf32=settings.tf32):
        return _bench(settings, device, note)


def _bench(settings: BenchSettings, device: torch.device, note: Callable[[str], None]) -> BenchResult:
    shop = Workshop(settings, device)
    settings = shop.settings
    note(f"{settings.model}: {len(shop.order.layers)} layers; building")
    arms = shop.arms()
    parts = {boundary: shop.parts(boundary) for boundary in shop.boundaries}
    costs = {name: arm.cost(shop.images, settings.precision) for name, arm in arms.items()}
    works = {"plain": Work(shop.plain_step()), **{name: arm.work(shop) for name, arm in arms.items()}}
    for boundary, part in parts.items():
        works |= {f"{name} {boundary}": work for name, work in part.items()}
    note(f"timing {len(works)} pieces of work in turn, {settings.warm_up} + {settings.rounds} rounds")
    times = take_turns(works, rounds=settings.rounds, warm_up=settings.warm_up, runs=settings.runs, device=device)
    peaks = {name: arm.peak(shop, costs[name].peak_bytes) for name, arm in arms.items()}
    part_ms = {
        boundary: {name: times[f"{name} {boundary}"].median for name in part} for boundary, part in parts.items()
    }
    rows = tuple(
        _row(name, arm, times, costs, peaks[name], part_ms.get(arm.method.boundary)) for name, arm in arms.items()
    )
    moves = {arm.method.boundary: arm.move_ms for arm in arms.values() if arm.label == "local"}
    layer_times: list[LayerTime] = []
    if settings.layers:
        note(f"timing {len(shop.order.layers)} layers one by one")
        layer_times = time_layers(
            shop.model,
            shop.images,
            precision=settings.precision,
            rounds=max(5, settings.rounds // 2),
            warm_up=settings.warm_up,
            runs=settings.runs,
        )
    return BenchResult(
        gather_environment(str(device)),
        settings,
        len(shop.order.layers),
        times["plain"],
        rows,
        part_ms,
        moves,
        tuple(_predictions(shop, rows)),
        tuple(layer_times),
    )


def _row(
    name: str,
    arm: Arm,
    times: Mapping[str, Timing],
    costs: Mapping[str, Cost],
    peak: int,
    parts: Mapping[str, float] | None,
) -> Row:
    time, sgd = times[name], times["sgd 0"]
    limit = times["plain"].median
    if parts is not None:
        limit = parts["prefix"] + parts["suffix"]
        if arm.label != "freeze":
            limit += parts["products"] / arm.method.period
    return Row(
        method=arm.label,
        boundary=arm.method.boundary,
        step_ms=time.median,
        step_ms_q25=time.q25,
        step_ms_q75=time.q75,
        flops=costs[name].flops,
        speedup=sgd.median / time.median,
        ideal=costs["sgd 0"].flops / costs[name].flops,
        limit_ms=limit,
        efficiency=limit / time.median,
        peak_memory_bytes=peak,
    )


def _predictions(shop: Workshop, rows: Sequence[Row]) -> list[Prediction]:
    """The speed-up of whole runs."""
    depth, epochs = len(shop.order.layers), shop.settings.epochs
    block = recurring_block(shop.model, shop.order.layers)
    sgd_ms = rows[0].step_ms
    predictions = []
    for name, schedule in known_schedules(depth, epochs).items():
        path = fastest_path(schedule, layers=depth, block=block, epochs=epochs)
        for method in ("local", "freeze"):
            step_ms = {row.boundary: row.step_ms for row in rows if row.method == method}
            step_ms[0] = rows[1].step_ms  # at boundary 0 they are one
            speedup = predicted_speedup(method, path, sgd_ms=sgd_ms, step_ms=step_ms, forward_flops=shop.forward_flops)
            predictions.append(Prediction(name, method, epochs, sum(path) / len(path), speedup))
    return predictions
