"""Time pieces of work in turn, so that a drift of the machine affects all alike; time single layers."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lowcal.discovery import trace
from lowcal.rules import apply_updates, hebbian_update
from lowcal.steps.step import PRECISIONS, autocast, now


@dataclass(frozen=True)
class Work:
    """A piece of work to be timed.

    Attributes:
        run: does it once.
        prepare: called before each sample with its number of runs; not timed.
        period: runs after which the work repeats; a sample is a whole number of periods.
    """

    run: Callable[[], object]
    prepare: Callable[[int], object] | None = None
    period: int = 1


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median and quartiles over the samples."""

    median: float
    q25: float
    q75: float

    def fields(self, name: str) -> dict[str, float]:
        """Return the three as the fields NAME, NAME_q25 and NAME_q75."""
        return {name: self.median, f"{name}_q25": self.q25, f"{name}_q75": self.q75}


def time_in_turn(
    works: Mapping[str, Work], *, rounds: int, warm_up: int, runs: int | None = None, device: torch.device
) -> dict[str, Timing]:
    """Time `works`, one sample of each in turn, starting with another one in each round.

    Args:
        rounds: samples of each.
        warm_up: samples of each before them, which do not count.
        runs: runs in a sample, at least; None: 1 on a CPU, 10 on an asynchronous device, so that the host runs ahead.
        device: synchronised before and after each sample.
    """
    if runs is None:
        runs = 1 if device.type == "cpu" else 10
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    was_enabled = gc.isenabled()
    gc.disable()  # a collection would fall into one of the samples
    try:
        for turn in range(-warm_up, rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                milliseconds = _sample(works[name], runs, device)
                if turn >= 0:
                    samples[name].append(milliseconds)
    finally:
        if was_enabled:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples: list[float]) -> Timing:
    """Median and quartiles of `samples`."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75)


def _sample(work: Work, runs: int, device: torch.device) -> float:
    count = -(-runs // work.period) * work.period
    if work.prepare is not None:
        work.prepare(count)
    start = now(device)
    for _ in range(count):
        work.run()
    return 1000.0 * (now(device) - start) / count


def time_layers(
    model: nn.Module, images: Tensor, *, precision: str, rounds: int, warm_up: int, runs: int | None
) -> list[dict[str, Any]]:
    """Time each layer by itself: its local update beside its SGD backward pass (the paper's Figure 1).

    Each layer gets random input of the size that it has for `images`.

    Returns:
        For each layer its name, its `kind`, and in milliseconds `local_ms` (Eqs. 3 and 4: the product, its norm, the
        change of the weight) and `backward_ms` (Eqs. 5 to 7: the gradients of weight and input and the optimizer's
        step; the first layer's input needs no gradient). `ratio` is backward_ms / local_ms.
    """
    order = trace(model, images[:1])
    shapes: dict[str, Tensor] = {}
    twin = copy.deepcopy(model).to("meta").train()
    for name in order.layers:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: shapes.__setitem__(name, args[0])
        )
    with torch.no_grad():
        twin(images.to("meta"))
    rows = []
    for index, name in enumerate(order.layers):
        module = copy.deepcopy(model.get_submodule(name))
        # In half precision, the layer before gives its output in that precision.
        dtype = PRECISIONS[precision] if index else None
        inputs = torch.randn_like(shapes[name], dtype=dtype, device=images.device, requires_grad=index > 0)
        with autocast(images.device, precision):
            outputs = module.forward(inputs)  # without its hooks, which have changed the input already
        works = {
            "local": Work(_local_update(module, inputs.detach(), outputs.detach())),
            "backward": Work(_backward(module, inputs, outputs)),
        }
        times = time_in_turn(works, rounds=rounds, warm_up=warm_up, runs=runs, device=images.device)
        local, backward = times["local"].median, times["backward"].median
        row = {"layer": name, "kind": type(module).__name__, "local_ms": local, "backward_ms": backward}
        rows.append(row | {"ratio": backward / local})
    return rows


def _local_update(module: nn.Module, inputs: Tensor, outputs: Tensor) -> Callable[[], object]:
    weight: Tensor = module.weight.detach().clone()  # type: ignore[operator]
    return lambda: apply_updates([weight], [hebbian_update(module, inputs, outputs)], 1e-4)


def _backward(module: nn.Module, inputs: Tensor, outputs: Tensor) -> Callable[[], None]:
    wanted = [*module.parameters(), *([inputs] if inputs.requires_grad else [])]
    gradient = outputs.detach().clone()
    # The optimizer has its own weight: the graph, which is used again, holds the layer's.
    weight = nn.Parameter(module.weight.detach().clone())  # type: ignore[operator]
    optimizer = SGD([weight], lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        weight.grad = torch.autograd.grad(outputs, wanted, gradient, retain_graph=True)[0]
        optimizer.step()

    return run
