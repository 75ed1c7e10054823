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
    skips on the device does not count. The weights of a layer with adapters are measured together, as one vector.

    Args:
        measure: "epoch" or "step", as `Schedule.measure` says.

    Attributes:
        by_step: whether norms are those of steps.
        start: the weight at the start of the epoch; None before the first `begin`.
    """

    def __init__(self, measure: Literal["epoch", "step"]) -> None:
        self.by_step = measure == "step"
        self.start: Tensor | None = None
        self._weights: Sequence[nn.Parameter] = ()
        self._holder: Optimizer | None = None
        self._before: Tensor | None = None  # the weight before the step
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the norms, and of the steps

    def begin(self, weights: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
        """Measures the change of `weights`, of which one of `optimizers` holds those that learn, from now on."""
        self.resume(weights, optimizers, _values(weights).clone(), (0.0, 0.0))

    def resume(
        self, weights: Sequence[nn.Parameter], optimizers: Sequence[Optimizer], start: Tensor, sums: Sequence[float]
    ) -> None:
        """Goes on from a saved state: the values at the start of the epoch, and `sums`."""
        self.start = start
        if self.by_step:
            holders = (holder(weight, optimizers) for weight in weights)
            self._weights, self._before = weights, None
            self._holder = next((optimizer for optimizer in holders if optimizer is not None), None)
            self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def sums(self) -> list[float]:
        """The sum of the steps' norms and the number of steps since `begin`. Reads from the device."""
        return self._sums.tolist()

    def norm(self, weights: Sequence[nn.Parameter]) -> float:
        """||dW_E|| of `weights` since `begin`; by step, 0 without a step. Reads from the device."""
        if self.by_step:
            total, steps = self.sums()
            return total / steps if steps else 0.0
        values = _values(weights)
        return float(torch.linalg.vector_norm(values - self.start.to(values.device)))  # type: ignore[union-attr]

    def make_replayable(self, device: torch.device) -> None:
        """Puts the values on which a replayed step depends on `device`."""
        if self.by_step:
            self._sums = self._sums.to(device)

    def begin_step(self, optimizer: Optimizer) -> None:
        """Called before a step of `optimizer`."""
        if self.by_step and self._weights and optimizer is self._holder:
            self._before = _values(self._weights).clone()

    def end_step(self, optimizer: Optimizer) -> None:
        """Called after a step of `optimizer`."""
        if self._before is None or optimizer is not self._holder:
            return
        norm = torch.linalg.vector_norm(_values(self._weights) - self._before).double()
        self._before = None
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step on the device itself
        taken = torch.ones_like(norm) if overflow is None else (overflow.reshape(()) == 0).to(norm)
        self._sums = self._sums.to(norm.device, non_blocking=True)
        self._sums += torch.stack([norm, taken])


def _values(weights: Sequence[nn.Parameter]) -> Tensor:
    """A weight as it is; several weights as one vector."""
    if len(weights) == 1:
        return weights[0].detach()
    return torch.cat([weight.detach().flatten() for weight in weights])
