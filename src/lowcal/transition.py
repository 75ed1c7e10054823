"""How far the transition layer's weight moves in an epoch: ||dW_E|| of Algorithm 1, in two readings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.arguments import holder


class TransitionChange:
    """Measures ||dW_E||, the change of one layer's weight over an epoch (docs/method.md).

    By "epoch", it is the L2 norm of the difference between the weight now and at the start. By "step", it is the mean
    of the L2 norms of the changes that the optimizer's steps make. That costs a copy of the weight and one norm in each
    step. Their sum is kept where the weight is, so that no step reads from the device. A step that a fused optimizer
    skips on the device does not count.

    Args:
        measure: "epoch" or "step", as `Schedule.measure` says.

    Attributes:
        by_step: whether norms are those of steps.
        start: the weight at the start of the epoch; None before the first `begin`.
    """

    def __init__(self, measure: Literal["epoch", "step"]) -> None:
        self.by_step = measure == "step"
        self.start: Tensor | None = None
        self._weight: nn.Parameter | None = None
        self._holder: Optimizer | None = None
        self._before: Tensor | None = None  # the weight before the step
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the norms, and of the steps

    def begin(self, weight: nn.Parameter, optimizers: Sequence[Optimizer]) -> None:
        """Measures the change of `weight`, which one of `optimizers` holds, from now on."""
        self.resume(weight, optimizers, weight.detach().clone(), (0.0, 0.0))

    def resume(
        self, weight: nn.Parameter, optimizers: Sequence[Optimizer], start: Tensor, sums: Sequence[float]
    ) -> None:
        """Goes on from a saved state: the weight at the start of the epoch, and `sums`."""
        self.start = start
        if self.by_step:
            self._weight, self._holder, self._before = weight, holder(weight, optimizers), None
            self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def sums(self) -> list[float]:
        """The sum of the steps' norms and the number of steps since `begin`. Reads from the device."""
        return self._sums.tolist()

    def norm(self, weight: Tensor) -> float:
        """||dW_E|| of `weight` since `begin`; by step, 0 without a step. Reads from the device."""
        if self.by_step:
            total, steps = self.sums()
            return total / steps if steps else 0.0
        return float(torch.linalg.vector_norm(weight - self.start.to(weight.device)))  # type: ignore[union-attr]

    def make_replayable(self, device: torch.device) -> None:
        """Puts the values on which a replayed step depends on `device`."""
        if self.by_step:
            self._sums = self._sums.to(device)

    def begin_step(self, optimizer: Optimizer) -> None:
        """Called before a step of `optimizer`."""
        if self.by_step and self._weight is not None and optimizer is self._holder:
            self._before = self._weight.detach().clone()

    def end_step(self, optimizer: Optimizer) -> None:
        """Called after a step of `optimizer`."""
        if self._weight is None or self._before is None or optimizer is not self._holder:
            return
        norm = torch.linalg.vector_norm(self._weight.detach() - self._before).double()
        self._before = None
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step on the device itself
        taken = torch.ones_like(norm) if overflow is None else (overflow.reshape(()) == 0).to(norm)
        self._sums = self._sums.to(norm.device, non_blocking=True)
        self._sums += torch.stack([norm, taken])
