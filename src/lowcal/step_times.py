"""How long a training step takes: at each boundary, measured on a copy, and in the epochs so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowcal.errors import LowcalError
from lowcal.layers import Order, own_parameters, weight_of
from lowcal.rules import Rule

FEWEST = 4  # steps at each boundary, after one that does not count
SECONDS = 2.0  # for all of them, if they are so short


class StepClock:
    """The mean time of an epoch's steps, without what comes before the first one and after the last one."""

    def __init__(self) -> None:
        self._count, self._first, self._last = 0, 0.0, 0.0

    def tick(self) -> None:
        """Counts a step that has ended."""
        self._last = perf_counter()
        self._first = self._first if self._count else self._last
        self._count += 1

    def read(self) -> float | None:
        """Seconds per step since the last call; None for fewer than two steps."""
        steps, seconds = self._count - 1, self._last - self._first
        self._count = 0
        return seconds / steps if steps > 0 and seconds > 0 else None


class StepTimes:
    """The step times that a schedule plans with (`Schedule.measures`).

    Attributes:
        measured: seconds of a step by boundary; empty until it is measured.
        taken: the boundary of each finished epoch, and the seconds that a step took in it; None if they are not known.
    """

    def __init__(self) -> None:
        self.measured: dict[int, float] = {}
        self.taken: list[tuple[int, float | None]] = []
        self._seen: tuple[Any, Any, torch.dtype | None] | None = None
        self._size = 0

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the inputs of the largest training pass, on which steps can be measured: the last one may be small."""
        device = next(module.parameters()).device.type
        if self.measured or device == "meta" or not (module.training and torch.is_grad_enabled()):
            return
        size = sum(leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if size <= self._size:
            return
        self._size = size
        is_cast = torch.is_autocast_enabled(device)
        self._seen = args, kwargs, torch.get_autocast_dtype(device) if is_cast else None

    def measure(self, model: nn.Module, order: Order, rule: Rule, most: int) -> None:
        """Measures steps at boundaries from 0 to `most`, unless they are measured already.

        Raises:
            LowcalError: no training pass of the model has been seen.
        """
        if self.measured:
            return
        if self._seen is None:
            raise LowcalError("a budget needs a training pass to measure steps; call the model itself in training mode")
        args, kwargs, dtype = self._seen
        boundaries = sorted({round(part * most) for part in (0.0, 1 / 3, 2 / 3, 1.0)})
        self.measured = measure_steps(model, order, rule, boundaries, args, kwargs, dtype)
        self._seen = None

    def known(self) -> dict[str, Any]:
        """`Progress.times` and `Progress.taken`."""
        return {"times": self.measured, "taken": tuple(self.taken)}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"measured": [list(time) for time in self.measured.items()], "taken": [list(t) for t in self.taken]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self.measured = {int(boundary): float(seconds) for boundary, seconds in state["measured"]}
        self.taken = [(boundary, seconds) for boundary, seconds in state["taken"]]


def measure_steps(
    model: nn.Module,
    order: Order,
    rule: Rule,
    boundaries: Sequence[int],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> dict[int, float]:
    """Seconds of a forward and backward pass at each boundary, in turn on a copy of the model.

    Args:
        args: of the model's forward, with `kwargs`: a mini-batch.
        dtype: of autocast; None: it is off.
    """
    trial = copy.deepcopy(model).train()
    own = own_parameters(order, trial)
    learning = [[parameter for parameter in own[name] if parameter.requires_grad] for name in order.layers]
    local: set[str] = set()

    def update(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            if name in local:
                rule.update(module, inputs[0].detach(), outputs.detach())

        return hook

    for name in order.layers:
        layer = trial.get_submodule(name)
        if weight_of(layer) is not None:
            layer.register_forward_hook(update(name))
    device = next(trial.parameters()).device
    phases = [True] if rule.every == 1 else [True, False]  # whether the rule acts
    samples: dict[tuple[int, bool], list[float]] = {(boundary, acts): [] for boundary in boundaries for acts in phases}
    end = perf_counter() + SECONDS
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        while len(samples[boundaries[0], True]) <= FEWEST or perf_counter() < end:
            for (boundary, acts), own_samples in samples.items():
                local.clear()
                local.update(order.layers[:boundary] if rule.collects and acts else ())
                for index, parameters in enumerate(learning):
                    for parameter in parameters:
                        parameter.requires_grad_(index >= boundary or (rule.opens and acts))
                own_samples.append(_step_seconds(trial, args, kwargs, dtype, device))
    middle = {key: median(values[1:]) for key, values in samples.items()}  # the first step chooses kernels
    weights = {True: 1 / rule.every, False: 1 - 1 / rule.every}
    return {boundary: sum(weights[acts] * middle[boundary, acts] for acts in phases) for boundary in boundaries}


def _step_seconds(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device
) -> float:
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(*args, **kwargs)
    losses = [leaf.float().mean() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack(losses).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start
