"""How long a training step takes: at each boundary, measured on a copy, and in the epochs so far."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowcal.errors import LowcalError
from lowcal.layers import Order, own_parameters, weight_of
from lowcal.rules import Rule

if TYPE_CHECKING:
    from lowcal.parallel import Exchange

FEWEST = 6  # steps at each boundary, after one that does not count
SECONDS = 3.0  # for all of them, if they are so short
MOST = 4096  # steps of an epoch, the last ones, whose times are kept

Key = TypeVar("Key")


def time_in_turn(works: Mapping[Key, Callable[[], float]]) -> dict[Key, float]:
    """The median seconds of each of `works`, which return theirs.

    They run in turn. Each is compared with the first one within a turn, where a machine's speed is alike: other work on
    it changes the speed for seconds, which is longer than a short step and shorter than a few long ones.
    """
    turns: list[dict[Key, float]] = []
    end = perf_counter() + SECONDS
    while len(turns) <= FEWEST or perf_counter() < end:
        turns.append({key: work() for key, work in works.items()})
    del turns[0]  # the first steps choose kernels
    first = next(iter(works))
    whole = median(turn[first] for turn in turns)
    return {key: whole * median(turn[key] / turn[first] for turn in turns) for key in works}


class StepClock:
    """The median time of an epoch's steps, without what comes before the first one and after the last one."""

    def __init__(self) -> None:
        self._ticks: deque[float] = deque(maxlen=MOST)

    def tick(self) -> None:
        """Counts a step that has ended."""
        self._ticks.append(perf_counter())

    def read(self, period: int = 1, *, is_queued: bool = False) -> float | None:
        """Seconds per step since the last call; None for too few steps.

        Args:
            period: after so many steps the kinds of step repeat.
            is_queued: whether the host runs ahead of the device, so that only the mean says how long a step takes.
        """
        ticks, spans = list(self._ticks), 0
        self._ticks.clear()
        spans = len(ticks) - 1 if is_queued else period
        seconds = [(end - start) / spans for start, end in zip(ticks, ticks[spans:], strict=False)] if spans > 0 else []
        return median(seconds) if seconds and median(seconds) > 0 else None


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

    def end_epoch(
        self,
        model: nn.Module,
        order: Order,
        rule: Rule,
        clock: StepClock,
        exchange: Exchange | None,
        *,
        boundary: int,
        most: int,
    ) -> None:
        """Adds an epoch at `boundary`, and measures steps at boundaries from 0 to `most` unless that is done.

        What a step takes beyond a pass of the copy (the optimizer, the loader) counts as the same at each boundary.

        Raises:
            LowcalError: no training pass of the model has been seen; or several processes do not exchange their times.
        """
        if exchange is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise LowcalError(
                "a budget of time needs the same step times in all processes; call lowcal.DistributedLoCal(model, "
                "local) instead of DDP"
            )
        seconds = clock.read(rule.every, is_queued=next(model.parameters()).device.type != "cpu")
        if exchange is not None and seconds is not None:
            (seconds,) = exchange.mean(seconds)
        self.taken.append((boundary, seconds))
        if self.measured:
            return
        if self._seen is None:
            raise LowcalError("a budget needs a training pass to measure steps; call the model itself in training mode")
        args, kwargs, dtype = self._seen
        measured = measure_steps(model, order, rule, spread(most), args, kwargs, dtype)
        if exchange is not None:
            measured = dict(zip(measured, exchange.mean(*measured.values()), strict=True))
        rest = max(0.0, seconds - measured[boundary]) if seconds is not None and boundary in measured else 0.0
        self.measured = {each: rest + value for each, value in measured.items()}
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


def spread(most: int) -> list[int]:
    """The boundaries at which steps are measured: up to four, from 0 to `most`."""
    return sorted({round(part * most) for part in (0.0, 1 / 3, 2 / 3, 1.0)})


class Trial:
    """Forward and backward passes of a copy of a network, with the work of a rule, at any boundary.

    Args:
        model: the copy, in training mode from now on.
    """

    def __init__(self, model: nn.Module, order: Order, rule: Rule) -> None:
        self._model, self._order, self._rule = model.train(), order, rule
        own = own_parameters(order, model)
        self._learning = [[parameter for parameter in own[name] if parameter.requires_grad] for name in order.layers]
        self._local: set[str] = set()
        self._updates: list[Tensor] = []  # which a step keeps until its end
        for name in order.layers:
            if weight_of(layer := model.get_submodule(name)) is not None:
                layer.register_forward_hook(self._update(name))

    def move_to(self, boundary: int, *, acts: bool = True) -> None:
        """Sets the boundary for the next passes, and whether the rule acts in them."""
        self._local = set(self._order.layers[:boundary] if self._rule.collects and acts else ())
        for index, parameters in enumerate(self._learning):
            for parameter in parameters:
                parameter.requires_grad_(index >= boundary or (self._rule.opens and acts))

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype | None) -> None:
        """Passes forward and backward; `dtype` is that of autocast, None without it."""
        self._updates.clear()
        self._model.zero_grad(set_to_none=True)
        device = next(self._model.parameters()).device.type
        with nullcontext() if dtype is None else torch.autocast(device, dtype):
            outputs = self._model(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.stack([leaf.float().mean() for leaf in leaves]).sum().backward()

    def _update(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            if name in self._local:
                self._updates.append(self._rule.update(module, inputs[0].detach(), outputs.detach()))

        return hook


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
    trial = Trial(copy.deepcopy(model), order, rule)
    device = next(model.parameters()).device

    def work(boundary: int, acts: bool) -> Callable[[], float]:
        def seconds() -> float:
            trial.move_to(boundary, acts=acts)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = perf_counter()
            trial(args, kwargs, dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return perf_counter() - start

        return seconds

    parts = {True: 1 / rule.every, False: 1 - 1 / rule.every}  # of the steps: those in which the rule acts, the others
    phases = [acts for acts, part in parts.items() if part]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = time_in_turn({(each, acts): work(each, acts) for each in boundaries for acts in phases})
    return {each: sum(parts[acts] * found[each, acts] for acts in phases) for each in boundaries}
