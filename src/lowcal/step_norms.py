"""||dW_E|| read as the mean norm of an epoch's steps (docs/method.md); the default reading does without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.arguments import holder


class StepNorms:
    """Adds up the L2 norms of the changes that an optimizer's steps make to one layer's weight.

    A step costs a copy of that weight and one norm. The sum is kept where the weight is, so that no step reads from
    the device. A step that a fused optimizer skips on the device does not count.
    """

    def __init__(self) -> None:
        self._weight: nn.Parameter | None = None
        self._holder: Optimizer | None = None
        self._before: Tensor | None = None  # the weight before the step
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the norms, and of the steps

    def start(self, weight: nn.Parameter, optimizers: Sequence[Optimizer], sums: Sequence[float] = (0.0, 0.0)) -> None:
        """Watches `weight`, which one of `optimizers` holds, from now on; `sums` are those of a saved state."""
        self._weight, self._holder, self._before = weight, holder(weight, optimizers), None
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def sums(self) -> list[float]:
        """The sum of the norms and the number of steps since `start`. Reads from the device."""
        return self._sums.tolist()

    def mean(self) -> float:
        """The mean norm of the steps since `start`; 0 without a step. Reads from the device."""
        total, steps = self.sums()
        return total / steps if steps else 0.0

    def make_replayable(self, device: torch.device) -> None:
        """Puts on `device` what a step that it replays depends on."""
        self._sums = self._sums.to(device)

    def begin_step(self, optimizer: Optimizer) -> None:
        """Before a step of `optimizer`."""
        if self._weight is not None and optimizer is self._holder:
            self._before = self._weight.detach().clone()

    def end_step(self, optimizer: Optimizer) -> None:
        """After a step of `optimizer`."""
        if self._weight is None or self._before is None or optimizer is not self._holder:
            return
        norm = torch.linalg.vector_norm(self._weight.detach() - self._before).double()
        self._before = None
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step on the device itself
        taken = torch.ones_like(norm) if overflow is None else (overflow.reshape(()) == 0).to(norm)
        self._sums = self._sums.to(norm.device, non_blocking=True)
        self._sums += torch.stack([norm, taken])
