"""One training step: forward, loss, backward, optimizer. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.overlap import Overlap
from lowcal.steps.optimizing import OptimizerStep

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


def now(device: torch.device) -> float:
    """Seconds on the clock once `device` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def build_scaler(device: torch.device, precision: str) -> GradScaler | None:
    """The gradient scaler that "fp16" needs; None for the others."""
    return GradScaler(device.type) if precision == "fp16" else None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or an error that caused it, means that memory ran out."""
    words = (
        "DefaultCPUAllocator",
        "CUDA error: out of memory",
        "_STATUS_ALLOC_FAILED",  # of cuBLAS, cuDNN
        "unable to find an engine",  # cuDNN has tried all its algorithms, and none has enough memory
    )
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__  # an interrupted capture raises an error of its own
    return False


def keep_batch(*batch: Tensor) -> tuple[Tensor, ...]:
    """The default of `StepOptions.collate`: the step receives the mini-batch itself."""
    return batch


@dataclass(frozen=True)
class StepOptions:
    """The options of every kind of step.

    Attributes:
        device: the device of the network and the mini-batches.
        precision: "float32", "bf16" or "fp16".
        scaler: the gradient scaler that "fp16" needs.
        guard: whether a step whose loss or gradient is NaN or infinite leaves weights, optimizer and buffers unchanged.
        batch: images in a full mini-batch, if some may be smaller.
        collate: makes the network's inputs and then the targets from the arguments of the step. It works only on the
            device, so a CUDA graph may record it.
        loss_fn: the mean loss of a mini-batch, 0-d, from the network's output and the targets.
        max_norm: gradients with a larger norm over all parameters are scaled down to it; None: they are not clipped.
        accumulate: parts of the mini-batch that are computed one after another, with less memory.
    """

    device: torch.device
    precision: str = "float32"
    scaler: GradScaler | None = None
    guard: bool = False
    batch: int | None = None
    collate: Callable[..., tuple[Tensor, ...]] = keep_batch
    loss_fn: Callable[..., Tensor] = F.cross_entropy
    max_norm: float | None = None
    accumulate: int = 1


class Learning(Protocol):
    """What a step asks of the way in which the network learns, beyond its optimizers: see `lowcal.methods.Method`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def unreplayable(self) -> str | None:
        """Why a step cannot be recorded on the device and replayed; None if it can."""
        ...

    @property
    def phase(self) -> int:
        """The kind of the next step; steps of the same kind give the device the same work."""
        ...

    def penalty(self, loss: Tensor) -> Tensor | None:
        """A 0-d tensor with graph to add to a mini-batch's mean loss `loss`, or None."""

    def make_replayable(self, device: torch.device) -> None:
        """Keeps numbers that change from epoch to epoch on `device` from now on."""

    def overlapped(self, overlap: Overlap) -> AbstractContextManager[None]:
        """Inside it, products of local updates run by `overlap`, if there are any."""
        ...

    def replayed(self) -> None:
        """Does the part of a step that runs in Python alone, after the device has replayed one of this phase."""


class Step(Protocol):
    """A training step."""

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last call left the network unchanged, 0-d on the device; None if that cannot happen."""
        ...

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch.

        Args:
            batch: the arguments of `StepOptions.collate`, on the network's device. The first dimension of each is N.

        Returns:
            The mini-batch's mean loss without penalty, a 0-d tensor on the device, which must not be changed.
        """
        ...


class EagerStep:
    """The step of a plain loop.

    With a scaler or a guard the host reads from the device in each step, unless the optimizers are built with
    ``fused=True``.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions
    ) -> None:
        self.skipped: Tensor | None = None
        self._model, self._learning, self._options = model, learning, options
        self._optimizing = OptimizerStep(
            model, optimizers, options.scaler, guard=options.guard, max_norm=options.max_norm
        )

    @staticmethod
    def check(model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions) -> None:
        """Accepts everything."""

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch; see `Step`."""
        given = self._options.collate(*batch)
        self._optimizing.begin()
        if self._options.accumulate == 1:
            loss, penalised = self._differentiate(*given)
        else:
            parts = zip(*(tensor.chunk(self._options.accumulate) for tensor in given), strict=True)
            sums = [self._differentiate(*part, share=len(part[0]) / len(given[0])) for part in parts]
            loss, penalised = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        self.skipped = self._optimizing.step(penalised)
        return loss

    def _differentiate(self, *part: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a part, a `share` of the mini-batch; its part of the loss, without and with penalty."""
        with autocast(self._options.device, self._options.precision):
            loss, own = self._losses(*part)
        if share != 1.0:
            loss, own = loss * share, own * share
        penalty = self._learning.penalty(loss)
        penalised, objective = (loss, own) if penalty is None else (loss + penalty, own + penalty)
        self._optimizing.backward(objective)
        return loss.detach(), penalised.detach()

    def _losses(self, *part: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a mini-batch, or of a part, and what this process differentiates: here the same."""
        *inputs, targets = part
        loss = self._options.loss_fn(self._model(*inputs), targets)
        return loss, loss
