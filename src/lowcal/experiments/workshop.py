"""Copies of one network for everything that a bench times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lowcal.data import Loader
from lowcal.discovery import trace
from lowcal.experiments.bench_settings import BenchSettings
from lowcal.experiments.limits import Parts
from lowcal.experiments.memory_format import puts_channels_last
from lowcal.experiments.timing import Work
from lowcal.method_settings import LocalSettings
from lowcal.methods import Method, build_method
from lowcal.models import build_model, check_input
from lowcal.strided import slice_inputs
from lowcal.training import graphed
from lowcal.training.cost import Cost, dry_cost, held_bytes
from lowcal.training.epoch import now
from lowcal.training.modes import build_step, find_step
from lowcal.training.step import StepOptions, as_given, autocast, build_scaler

LR = 1e-4  # of SGD and of local updates: small, so that the same mini-batch can be trained on for long


class Workshop:
    """The network, its images, and copies of it for everything that is timed; `settings` say which memory format it is.

    Args:
        loader: steps make their mini-batch as a run's do, from the first that it draws; None: they are given one.
    """

    def __init__(self, settings: BenchSettings, device: torch.device, loader: Loader | None = None) -> None:
        find_step(settings.step), autocast(device, settings.precision)  # these refuse what there is not
        channels_last = puts_channels_last(settings.channels_last, device, settings.precision)
        self.settings, self.device = replace(settings, channels_last=channels_last), device
        shape = (3, settings.image_size, settings.image_size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            self.model = build_model(settings.model, classes=settings.classes, width=settings.width)
            check_input(self.model, settings.model, shape)
            self.images = torch.randn(settings.batch, *shape).to(device)
            self.labels = torch.randint(settings.classes, (settings.batch,)).to(device)
        self.model = self.model.to(device).train()
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        slice_inputs(self.model)
        self.make: Callable[..., tuple[Tensor, Tensor]] = as_given if loader is None else loader.collate
        self.given: tuple[Tensor, ...] = (self.images, self.labels) if loader is None else next(loader.raw_batches())
        self.order = trace(self.model, self.images[:1])
        depth = len(self.order.layers)
        self.boundaries = sorted({int(fraction * depth + 1e-9) for fraction in settings.boundaries} - {0})
        self.forward_flops = forward_flops(self.model, self.images, self.order.layers)

    def optimizer(self, parameters: Sequence[Tensor]) -> Optimizer:
        """As training has it."""
        return SGD(list(parameters), lr=LR, momentum=0.9, weight_decay=5e-4, fused=True)

    def arms(self) -> dict[str, Arm]:
        """Methods at boundaries, by name; each has a copy of the network."""
        every = self.settings.every
        arms = [Arm(self, "sgd", 0), Arm(self, "local", 0)]
        for boundary in self.boundaries:
            arms += [Arm(self, "local", boundary), Arm(self, "freeze", boundary)]
            if every > 1:
                arms.append(Arm(self, "local", boundary, every))
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
            graphs=graphed.GRAPHS(self.device) if self.settings.step == "graphed" else None,
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


class Arm:
    """A method at a boundary, on a network of its own."""

    def __init__(self, shop: Workshop, method: str, boundary: int, every: int = 1) -> None:
        settings = shop.settings
        self.label = method if every == 1 else f"{method}/{every}"
        self.model = copy.deepcopy(shop.model)
        self.optimizer = shop.optimizer(list(self.model.parameters()))
        self.method: Method = build_method(
            method,
            self.model,
            self.optimizer,
            LocalSettings(lr=LR, every=every, norm_stats=settings.norm_stats),  # type: ignore[arg-type]
            epochs=settings.epochs,
            example_inputs=shop.images[:1],
        )
        # Other steps than the eager one are built as they first run: what that takes belongs to the move.
        first = 0 if settings.step == "eager" else (graphed.EAGER_STEPS + 1) * self.method.period
        if boundary:
            self._build(shop)
            self._run(shop, first)
        self.move_ms = self._milliseconds(shop, first, lambda: self.method.move_to(boundary))
        if first:
            self.move_ms -= self._milliseconds(shop, first)

    def _build(self, shop: Workshop) -> None:
        scaler = build_scaler(shop.device, shop.settings.precision)
        options = StepOptions(shop.device, shop.settings.precision, scaler, make=shop.make)
        self.step = build_step(shop.settings.step, self.model, self.optimizer, self.method, options)

    def _run(self, shop: Workshop, steps: int) -> None:
        for _ in range(steps):
            self.step(*shop.given)

    def _milliseconds(self, shop: Workshop, steps: int, move: Callable[[], None] | None = None) -> float:
        """The time of so many steps, before which the step is built anew after a `move`."""
        start = now(shop.device)
        if move is not None:
            move()
            self._build(shop)
        self._run(shop, steps)
        return 1000.0 * (now(shop.device) - start)

    def work(self, shop: Workshop) -> Work:
        """Its step, to be timed."""
        return Work(lambda: self.step(*shop.given), period=self.method.period)

    def cost(self, images: Tensor, precision: str) -> Cost:
        """FLOPs of its step and bytes, counted."""
        return dry_cost(self.method, images.shape, precision=precision)

    def peak(self, shop: Workshop, counted: int) -> int:
        """Peak memory of a step: measured on CUDA, elsewhere as `counted`."""
        if shop.device.type != "cuda":
            return counted
        del self.step  # with its graphs, whose tensors the next one's take the place of
        others = torch.cuda.memory_allocated(shop.device) - held_bytes(self.model, self.optimizer)
        torch.cuda.reset_peak_memory_stats(shop.device)
        self._build(shop)  # a step that is replayed allocates when it is recorded alone
        self._run(shop, (graphed.EAGER_STEPS + 1) * self.method.period)
        return torch.cuda.max_memory_allocated(shop.device) - others


def forward_flops(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[float]:
    """FLOPs of the forward pass of each of `layers`, from its output's size; nothing is computed."""
    twin = copy.deepcopy(model).to("meta")
    flops: dict[str, float] = {}
    for name in layers:

        def count(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            flops[name] = 2.0 * output.numel() * module.weight[0].numel()  # type: ignore[index]

        twin.get_submodule(name).register_forward_hook(count)
    with torch.no_grad():
        twin(images.to("meta"))
    return [flops[name] for name in layers]
