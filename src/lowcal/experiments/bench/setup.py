"""What a bench measures, and copies of the network for each piece of work that it times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lowcal.data import Loader
from lowcal.discovery import trace
from lowcal.errors import LowcalError
from lowcal.experiments.backends import puts_channels_last
from lowcal.experiments.bench.limits import Parts
from lowcal.experiments.bench.timing import Work
from lowcal.files import first_line
from lowcal.method_settings import LocalSettings
from lowcal.methods import Method, build_method
from lowcal.models import build_model, check_input
from lowcal.steps import graphed
from lowcal.steps.modes import build_step, find_step
from lowcal.steps.step import StepOptions, autocast, build_scaler, keep_batch, now
from lowcal.strided import slice_inputs
from lowcal.training.cost import Cost, dry_cost, held_bytes

COMPILED_STEPS = 4  # after which torch.compile has compiled and recorded
LR = 1e-4  # of SGD and of local updates: small, so that the same mini-batch can be trained on for long


@dataclass(frozen=True)
class BenchSettings:
    """What `lowcal bench` measures.

    Attributes:
        model: a network's name.
        batch: images in a mini-batch.
        image_size: their height and width.
        boundaries: as fractions of the network's layers; 0 is always measured too.
        width: channels of the network's first stage; None: its own.
        precision: "float32", "bf16" or "fp16".
        tf32: whether float32 products on a GPU round their factors to 10 bits; None: torch's choice.
        channels_last: the memory format; None: the faster one (`puts_channels_last`).
        step: how a step is run, a mode of `steps.modes`.
        norm_stats: the statistics that normalisation before the boundary uses.
        every: adds a row with a local update every `every` steps; 1 adds none.
        rounds: samples of each time.
        warm_up: samples before those.
        runs: steps in a sample; None: 1 on a CPU, 10 on an asynchronous device.
        epochs: of the whole run whose speed-up is predicted.
        layers: whether single layers are timed too.
        compile: whether the plain loop is timed under torch.compile too; None: on a GPU.
    """

    model: str
    batch: int
    image_size: int
    classes: int = 10
    boundaries: tuple[float, ...] = (0.25, 0.5, 0.75)
    width: int | None = None
    precision: str = "float32"
    tf32: bool | None = None
    channels_last: bool | None = None
    step: str = "eager"
    norm_stats: str = "batch"
    every: int = 4
    rounds: int = 20
    warm_up: int = 3
    runs: int | None = None
    epochs: int = 90
    layers: bool = True
    compile: bool | None = None

    def __post_init__(self) -> None:
        for fraction in self.boundaries:
            if not 0 <= fraction < 1:
                raise LowcalError(f"boundary {fraction}: give fractions of the layers, from 0 to below 1")
        for name in ("batch", "image_size", "every", "rounds", "warm_up", "epochs"):
            if getattr(self, name) < 1:
                raise LowcalError(f"{name} is {getattr(self, name)}; give at least 1")


def parse_boundaries(text: str) -> tuple[float, ...]:
    """Return the fractions in `text`, which are separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LowcalError(f"boundaries {text!r}: give fractions separated by commas, as in 0,0.25,0.5") from None


class BenchSetup:
    """The network, its images, and copies of it for each piece of work that is timed.

    `settings` has what was chosen where it was None: the memory format, and whether to compile the plain loop.

    Args:
        loader: steps prepare its first mini-batch as the steps of a run do; None: they get a prepared one.
    """

    def __init__(self, settings: BenchSettings, device: torch.device, loader: Loader | None = None) -> None:
        find_step(settings.step)  # refuses an unknown kind of step
        autocast(device, settings.precision)  # refuses an unknown precision
        channels_last = puts_channels_last(settings.channels_last, device, settings.precision)
        compiles = device.type == "cuda" if settings.compile is None else settings.compile
        self.settings, self.device = replace(settings, channels_last=channels_last, compile=compiles), device
        shape = (3, settings.image_size, settings.image_size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            self.model = build_model(
                settings.model, classes=settings.classes, width=settings.width, image_size=settings.image_size
            )
            check_input(self.model, settings.model, shape, settings.classes)
            self.images = torch.randn(settings.batch, *shape).to(device)
            self.labels = torch.randint(settings.classes, (settings.batch,)).to(device)
        self.model = self.model.to(device).train()
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        slice_inputs(self.model)
        self.collate: Callable[..., tuple[Tensor, ...]] = keep_batch if loader is None else loader.collate
        self.given: tuple[Tensor, ...] = (self.images, self.labels) if loader is None else next(loader.raw_batches())
        self.order = trace(self.model, self.images[:1])
        depth = len(self.order.layers)
        self.boundaries = sorted({int(fraction * depth + 1e-9) for fraction in settings.boundaries} - {0})
        self.forward_flops = forward_flops(self.model, self.images, self.order.layers)

    def optimizer(self, parameters: Sequence[Tensor]) -> Optimizer:
        """Return the optimizer that training uses."""
        return SGD(list(parameters), lr=LR, momentum=0.9, weight_decay=5e-4, fused=True)

    def methods(self) -> dict[str, TimedMethod]:
        """Return the methods at each boundary by name; each has a copy of the network."""
        every = self.settings.every
        methods = [TimedMethod(self, "sgd", 0), TimedMethod(self, "local", 0)]
        for boundary in self.boundaries:
            methods += [TimedMethod(self, "local", boundary), TimedMethod(self, "freeze", boundary)]
            if every > 1:
                methods.append(TimedMethod(self, "local", boundary, every))
        return {f"{timed.label} {timed.method.boundary}": timed for timed in methods}

    def parts(self, boundary: int) -> dict[str, Work]:
        """Return the parts of the limit."""
        parts = Parts(
            copy.deepcopy(self.model),
            self.optimizer,
            self.images,
            self.labels,
            boundary=boundary,
            precision=self.settings.precision,
            graphs=graphed.GRAPHS(self.device) if "graphed" in self.settings.step else None,
        )
        return {"prefix": parts.prefix, "suffix": parts.suffix, "products": parts.products}

    def plain_step(self, mode: str | None = None) -> Callable[[], None]:
        """Return the body of a plain training loop; `mode` is that of torch.compile, None: not compiled."""
        model, images, labels = copy.deepcopy(self.model), self.images, self.labels
        optimizer = SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
        device, precision = self.device, self.settings.precision
        scaler = build_scaler(device, precision)
        forward = model if mode is None else torch.compile(model, mode=mode)

        def step() -> None:
            optimizer.zero_grad()
            with autocast(device, precision):
                loss = F.cross_entropy(forward(images), labels)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        return step

    @property
    def compile_mode(self) -> str:
        """The mode of torch.compile that suits a plain loop: with CUDA graphs on a GPU."""
        return "reduce-overhead" if self.device.type == "cuda" else "default"

    def compiled_plain_step(self, mode: str) -> Callable[[], None]:
        """Return the body of a plain training loop under torch.compile, compiled and warm.

        Raises:
            LowcalError: torch cannot compile the network here.
        """
        step = self.plain_step(mode)
        try:
            for _ in range(COMPILED_STEPS):
                step()
        except Exception as error:
            text = f"the plain loop cannot be compiled ({first_line(error)}); use --no-compile"
            raise LowcalError(text) from error
        return step


class TimedMethod:
    """A method at a boundary, with its own copy of the network."""

    def __init__(self, setup: BenchSetup, method: str, boundary: int, every: int = 1) -> None:
        self._setup, settings = setup, setup.settings
        self.label = method if every == 1 else f"{method}/{every}"
        self.model = copy.deepcopy(setup.model)
        self.optimizer = setup.optimizer(list(self.model.parameters()))
        self.method: Method = build_method(
            method,
            self.model,
            self.optimizer,
            LocalSettings(lr=LR, every=every, norm_stats=settings.norm_stats),  # type: ignore[arg-type]
            epochs=settings.epochs,
            example_inputs=setup.images[:1],
        )
        # Steps other than the eager one are built when they first run; that time belongs to the move.
        first = 0 if settings.step == "eager" else (graphed.EAGER_STEPS + 1) * self.method.period
        if boundary:
            self._build()
            self._run(first)
        self.move_ms = self._milliseconds(first, lambda: self.method.move_to(boundary))
        if first:
            self.move_ms -= self._milliseconds(first)

    def _build(self) -> None:
        device, settings = self._setup.device, self._setup.settings
        scaler = build_scaler(device, settings.precision)
        options = StepOptions(device, settings.precision, scaler, collate=self._setup.collate)
        self.step = build_step(settings.step, self.model, (self.optimizer,), self.method, options)

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(*self._setup.given)

    def _milliseconds(self, steps: int, move: Callable[[], None] | None = None) -> float:
        """Time so many steps; with `move`, the move and the rebuilding of the step are part of it."""
        start = now(self._setup.device)
        if move is not None:
            move()
            self._build()
        self._run(steps)
        return 1000.0 * (now(self._setup.device) - start)

    def work(self) -> Work:
        """Return its step, to be timed."""
        return Work(lambda: self.step(*self._setup.given), period=self.method.period)

    def cost(self) -> Cost:
        """Count the FLOPs and bytes of its step."""
        return dry_cost(self.method, self._setup.images.shape, precision=self._setup.settings.precision)

    def peak(self, counted: int) -> int:
        """Measure the peak memory of a step on CUDA; elsewhere return `counted`."""
        device = self._setup.device
        if device.type != "cuda":
            return counted
        del self.step  # and its graphs, whose memory the next step uses
        others = torch.cuda.memory_allocated(device) - held_bytes(self.model, self.optimizer)
        torch.cuda.reset_peak_memory_stats(device)
        self._build()  # a replayed step allocates only while it is recorded
        self._run((graphed.EAGER_STEPS + 1) * self.method.period)
        return torch.cuda.max_memory_allocated(device) - others


def forward_flops(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[float]:
    """Return the FLOPs of the forward pass of each of `layers`, from the sizes of their outputs."""
    twin = copy.deepcopy(model).to("meta")
    flops: dict[str, float] = {}
    for name in layers:

        def count(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            flops[name] = 2.0 * output.numel() * module.weight[0].numel()  # type: ignore[index]

        twin.get_submodule(name).register_forward_hook(count)
    with torch.no_grad():
        twin(images.to("meta"))
    return [flops[name] for name in layers]
