"""One training step: forward, loss, backward, optimizer. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods import Method
from lowcal.methods.base import fill_momentum
from lowcal.training.guard import Guard, overflowed

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes run: automatic mixed precision, or none with "float32".

    Raises:
        LowcalError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise LowcalError(f"there is no precision {precision!r}{nearest(precision, PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def build_scaler(device: torch.device, precision: str) -> GradScaler | None:
    """The gradient scaler that "fp16" needs; None with the others."""
    return GradScaler(device.type) if precision == "fp16" else None


def as_given(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a step is given is the mini-batch itself."""
    return images, labels


@dataclass(frozen=True)
class StepOptions:
    """What every kind of step is told.

    Attributes:
        device: where everything is.
        precision: "float32", "bf16" or "fp16".
        scaler: the gradient scaler that "fp16" needs.
        guard: whether a step whose loss or gradient is NaN or infinite leaves weights, optimizer and buffers as they
            were.
        batch: images in a whole mini-batch, if some may be smaller.
        make: from a raw batch (`Loader.raw_batches`) to images (N, C, H, W), normalised, and class numbers (N,);
            work for the device alone, which may be recorded.
    """

    device: torch.device
    precision: str = "float32"
    scaler: GradScaler | None = None
    guard: bool = False
    batch: int | None = None
    make: Callable[..., tuple[Tensor, Tensor]] = as_given


class Step(Protocol):
    """A training step."""

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last call left the network as it was, 0-d on the device; None if that cannot happen."""
        ...

    def __call__(self, *given: Tensor) -> Tensor:
        """Trains on one mini-batch.

        Args:
            given: what `StepOptions.make` makes it from, on the network's device; the first dimension of each tensor
                is N.

        Returns:
            The mini-batch's mean cross entropy without penalty, a 0-d tensor on the device, not to be changed.
        """
        ...


class EagerStep:
    """The step as a plain loop would write it.

    A scaler reads from the device in each step unless the optimizer is built with ``fused=True``; so does the guard.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Method, options: StepOptions) -> None:
        self.skipped: Tensor | None = None
        self._model = model
        self._optimizer = optimizer
        self._method = method
        self._options = options
        self._scaler = options.scaler
        self._guard = Guard(model, optimizer, options.device) if options.guard else None
        if self._scaler is not None or self._guard is not None:
            fill_momentum(optimizer)  # a first step that is skipped would leave it as it was allocated

    @staticmethod
    def check(model: nn.Module, optimizer: Optimizer, method: Method, device: torch.device) -> None:
        """Applies to all."""

    def __call__(self, *given: Tensor) -> Tensor:
        """Trains on one mini-batch; as `Step` says."""
        images, labels = self._options.make(*given)
        self._optimizer.zero_grad(set_to_none=True)
        if self._guard is not None:
            self._guard.remember()
        with autocast(self._options.device, self._options.precision):
            loss, own = self._losses(images, labels)
        penalty = self._method.penalty(loss)
        whole, total = (loss, own) if penalty is None else (loss + penalty, own + penalty)
        (total if self._scaler is None else self._scaler.scale(total)).backward()
        if self._guard is not None:
            self.skipped = self._guard.step(whole.detach(), self._scaler)
        elif self._scaler is not None:
            self._scaler.step(self._optimizer)
            self.skipped = overflowed(self._scaler, self._optimizer)
        else:
            self._optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        return loss.detach()

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mini-batch's mean loss, and what is to be differentiated in its place: here the same."""
        loss = F.cross_entropy(self._model(images), labels)
        return loss, loss
