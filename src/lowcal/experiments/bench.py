"""`lowcal bench`: what a training step costs at each boundary, and how near that is to the least that it can."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lowcal.errors import LowcalError
from lowcal.experiments.layer_times import LayerTime, time_layers
from lowcal.experiments.limits import Parts
from lowcal.experiments.predict import fastest_path, known_schedules, predicted_speedup
from lowcal.experiments.recipe import LocalSettings
from lowcal.experiments.timing import Timing, Work, take_turns
from lowcal.layers import recurring_block, trace
from lowcal.methods import Method, build_method
from lowcal.models import build_model, check_input
from lowcal.training.cost import Cost, dry_cost, held_bytes
from lowcal.training.environment import gather_environment
from lowcal.training.step import autocast, build_scaler, build_step

LR = 1e-4  # of SGD and of local updates: small, so that the same mini-batch can be trained on for long


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        model: a network's name.
        batch: images in a mini-batch.
        image_size: their height and width.
        boundaries: as fractions of the network's layers; 0 is always measured too.
        width: channels of the network's first stage; None: its own.
        precision: "float32", "bf16" or "fp16".
        channels_last: the memory format.
        step: how a step is run; "eager".
        norm_stats: what normalisation before the boundary normalises by.
        every: local updates in each `every`-th step, in a row of its own; 1 leaves that row out.
        rounds: samples of each time.
        warm_up: samples before those.
        runs: steps in a sample; None: 1 on CPU, 10 on a device that works on its own.
        epochs: of the run whose speed-up is predicted.
        layers: whether single layers are timed too.
    """

    model: str
    batch: int
    image_size: int
    classes: int = 10
    boundaries: tuple[float, ...] = (0.25, 0.5, 0.75)
    width: int | None = None
    precision: str = "float32"
    channels_last: bool = False
    step: str = "eager"
    norm_stats: str = "batch"
    every: int = 4
    rounds: int = 20
    warm_up: int = 3
    runs: int | None = None
    epochs: int = 90
    layers: bool = True

    def __post_init__(self) -> None:
        for fraction in self.boundaries:
            if not 0 <= fraction < 1:
                raise LowcalError(f"boundary {fraction}: give fractions of the layers, from 0 to below 1")
        for name in ("batch", "image_size", "every", "rounds", "warm_up", "epochs"):
            if getattr(self, name) < 1:
                raise LowcalError(f"{name} is {getattr(self, name)}; give at least 1")


def parse_boundaries(text: str) -> tuple[float, ...]:
    """The fractions in `text`, which commas separate."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LowcalError(f"boundaries {text!r}: give fractions separated by commas, as in 0,0.25,0.5") from None


@dataclass(frozen=True)
class Row:
    """One method at one boundary.

    Attributes:
        method: "local/n" makes local updates in each n-th step; its figures are means over n steps.
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
    bench = _Bench(settings, device)
    note(f"{settings.model}: {len(bench.order.layers)} layers; building")
    arms = bench.arms()
    parts = {boundary: bench.parts(boundary) for boundary in bench.boundaries}
    costs = {name: arm.cost(bench.images, settings.precision) for name, arm in arms.items()}
    works = {"plain": Work(bench.plain_step()), **{name: arm.work(bench) for name, arm in arms.items()}}
    for boundary, part in parts.items():
        works |= {f"{name} {boundary}": work for name, work in part.items()}
    note(f"timing {len(works)} pieces of work in turn, {settings.warm_up} + {settings.rounds} rounds")
    runs = settings.runs or (1 if device.type == "cpu" else 10)
    times = take_turns(works, rounds=settings.rounds, warm_up=settings.warm_up, runs=runs, device=device)
    peaks = {name: arm.peak(bench, costs[name].peak_bytes) for name, arm in arms.items()}
    part_ms = {
        boundary: {name: times[f"{name} {boundary}"].median for name in part} for boundary, part in parts.items()
    }
    rows = tuple(
        _row(name, arm, times, costs, peaks[name], part_ms.get(arm.method.boundary)) for name, arm in arms.items()
    )
    moves = {arm.method.boundary: arm.move_ms for arm in arms.values() if arm.label == "local"}
    layer_times: list[LayerTime] = []
    if settings.layers:
        note(f"timing {len(bench.order.layers)} layers one by one")
        layer_times = time_layers(
            bench.model,
            bench.images,
            precision=settings.precision,
            rounds=max(5, settings.rounds // 2),
            warm_up=settings.warm_up,
            runs=runs,
        )
    return BenchResult(
        gather_environment(str(device)),
        settings,
        len(bench.order.layers),
        times["plain"],
        rows,
        part_ms,
        moves,
        tuple(bench.predictions(rows)),
        tuple(layer_times),
    )


def _row(
    name: str,
    arm: _Arm,
    times: dict[str, Timing],
    costs: dict[str, Cost],
    peak: int,
    parts: dict[str, float] | None,
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


class _Bench:
    """The network, its images, and copies of it for everything that is timed."""

    def __init__(self, settings: BenchSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        shape = (3, settings.image_size, settings.image_size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            self.model = build_model(settings.model, classes=settings.classes, width=settings.width)
            check_input(self.model, settings.model, shape)
            self.images = torch.randn(settings.batch, *shape).to(device)
            self.labels = torch.randint(settings.classes, (settings.batch,)).to(device)
        self.model = self.model.to(device).train()
        if settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.order = trace(self.model, self.images[:1])
        depth = len(self.order.layers)
        self.boundaries = sorted({int(fraction * depth + 1e-9) for fraction in settings.boundaries} - {0})
        self.forward_flops = _forward_flops(self.model, self.images, self.order.layers)

    def optimizer(self, parameters: Sequence[Tensor]) -> Optimizer:
        """As training has it."""
        fused = self.device.type == "cuda"
        return SGD(list(parameters), lr=LR, momentum=0.9, weight_decay=5e-4, fused=fused)

    def arms(self) -> dict[str, _Arm]:
        """Methods at boundaries, by name; each has a copy of the network."""
        every = self.settings.every
        arms = [_Arm(self, "sgd", 0), _Arm(self, "local", 0)]
        for boundary in self.boundaries:
            arms += [_Arm(self, "local", boundary), _Arm(self, "freeze", boundary)]
            if every > 1:
                arms.append(_Arm(self, "local", boundary, every))
        return {f"{arm.label} {arm.method.boundary}": arm for arm in arms}

    def parts(self, boundary: int) -> dict[str, Work]:
        """The parts of the limit."""
        parts = Parts(
            copy.deepcopy(self.model),
            self.optimizer,
            self.images,
            self.labels,
            boundary=boundary,
            precision=self.settings.precision,
        )
        return {"prefix": parts.prefix, "suffix": parts.suffix, "products": parts.products}

    def plain_step(self) -> Callable[[], None]:
        """A loop's body as anyone would write it."""
        model, images, labels = copy.deepcopy(self.model), self.images, self.labels
        optimizer = SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
        device, precision = self.device, self.settings.precision
        scaler = build_scaler(device, precision)

        def step() -> None:
            optimizer.zero_grad()
            with autocast(device, precision):
                loss = F.cross_entropy(model(images), labels)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        return step

    def predictions(self, rows: Sequence[Row]) -> list[Prediction]:
        """The speed-up of whole runs."""
        depth, epochs = len(self.order.layers), self.settings.epochs
        block = recurring_block(self.model, self.order.layers)
        sgd_ms = rows[0].step_ms
        predictions = []
        for name, schedule in known_schedules(depth, epochs).items():
            path = fastest_path(schedule, layers=depth, block=block, epochs=epochs)
            for method in ("local", "freeze"):
                step_ms = {row.boundary: row.step_ms for row in rows if row.method == method}
                step_ms[0] = rows[1].step_ms  # at boundary 0 they are one
                speedup = predicted_speedup(
                    method, path, sgd_ms=sgd_ms, step_ms=step_ms, forward_flops=self.forward_flops
                )
                predictions.append(Prediction(name, method, epochs, sum(path) / len(path), speedup))
        return predictions


class _Arm:
    """A method at a boundary, on a network of its own."""

    def __init__(self, bench: _Bench, method: str, boundary: int, every: int = 1) -> None:
        settings = bench.settings
        self.label = method if every == 1 else f"{method}/{every}"
        self.model = copy.deepcopy(bench.model)
        self.optimizer = bench.optimizer(list(self.model.parameters()))
        self.method: Method = build_method(
            method,
            self.model,
            self.optimizer,
            LocalSettings(lr=LR, every=every, norm_stats=settings.norm_stats),  # type: ignore[arg-type]
            epochs=settings.epochs,
            example_inputs=bench.images[:1],
        )
        start = perf_counter()
        self.method.move_to(boundary)
        self.step = build_step(
            settings.step,
            self.model,
            self.optimizer,
            self.method,
            device=bench.device,
            precision=settings.precision,
            scaler=build_scaler(bench.device, settings.precision),
        )
        self.move_ms = 1000.0 * (perf_counter() - start)

    def work(self, bench: _Bench) -> Work:
        return Work(lambda: self.step(bench.images, bench.labels), period=self.method.period)

    def cost(self, images: Tensor, precision: str) -> Cost:
        return dry_cost(self.method, images.shape, precision=precision)

    def peak(self, bench: _Bench, counted: int) -> int:
        """Peak memory of a step: measured on CUDA, elsewhere as `counted`."""
        if bench.device.type != "cuda":
            return counted
        others = torch.cuda.memory_allocated(bench.device) - held_bytes(self.model, self.optimizer)
        torch.cuda.reset_peak_memory_stats(bench.device)
        for _ in range(self.method.period):
            self.step(bench.images, bench.labels)
        return torch.cuda.max_memory_allocated(bench.device) - others


def _forward_flops(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[float]:
    """FLOPs of each layer's forward pass, from its output's size."""
    twin = copy.deepcopy(model).to("meta")
    flops: dict[str, float] = {}
    for name in layers:

        def count(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            flops[name] = 2.0 * output.numel() * module.weight[0].numel()  # type: ignore[index]

        twin.get_submodule(name).register_forward_hook(count)
    with torch.no_grad():
        twin(images.to("meta"))
    return [flops[name] for name in layers]
