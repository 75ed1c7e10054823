"""||dW_E|| read as the mean norm of an epoch's steps (docs/method.md); the default reading does without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.hooks import Hook


class StepNorms:
    """Adds up the L2 norms of the changes that an optimizer's steps make to one layer's weight.

    A step costs a copy of that weight and one norm. The sum is kept where the weight is, so that no step reads from
    the device. A step that a fused optimizer skips on the device does not count.

    Attributes:
        handles: of the hooks on the optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(Hook(self._before_step)),
            optimizer.register_step_post_hook(Hook(self._after_step)),
        ]
        self._module: nn.Module | None = None
        self._before: Tensor | None = None  # the weight before the step
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the norms, and of the steps

    def start(self, module: nn.Module, sums: Sequence[float] = (0.0, 0.0)) -> None:
        """Watches the weight of `module` from now on; `sums` are those of a saved state."""
        self._module, self._before = module, None
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

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._module is not None:
            self._before = self._module.get_parameter("weight").detach().clone()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._module is None or self._before is None:
            return
        change = self._module.get_parameter("weight").detach() - self._before
        self._before = None
        norm = torch.linalg.vector_norm(change).double()
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step on the device itself
        taken = torch.ones_like(norm) if overflow is None else (overflow.reshape(()) == 0).to(norm)
        self._sums = self._sums.to(norm.device, non_blocking=True)
        self._sums += torch.stack([norm, taken])
