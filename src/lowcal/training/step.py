"""One training step: forward, loss, backward, optimizer. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods import Method
from lowcal.methods.base import fill_momentum
from lowcal.training.distributed import TrainingGroup

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


def keep_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The default of `StepOptions.collate`: the step receives the mini-batch itself."""
    return images, labels


@dataclass(frozen=True)
class StepOptions:
    """The options of every kind of step.

    Attributes:
        device: the device of the network and the mini-batches.
        precision: "float32", "bf16" or "fp16".
        scaler: the gradient scaler that "fp16" needs.
        guard: whether a step whose loss or gradient is NaN or infinite leaves weights, optimizer and buffers unchanged.
        batch: images in a full mini-batch, if some may be smaller.
        collate: makes images (N, C, H, W), normalised, and class numbers (N,) from the arguments of the step. It works
            only on the device, so a CUDA graph may record it.
    """

    device: torch.device
    precision: str = "float32"
    scaler: GradScaler | None = None
    guard: bool = False
    batch: int | None = None
    collate: Callable[..., tuple[Tensor, Tensor]] = keep_batch


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
            The mini-batch's mean cross entropy without penalty, a 0-d tensor on the device, which must not be changed.
        """
        ...


class EagerStep:
    """The step of a plain loop.

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
            fill_momentum(optimizer)  # a skipped first step would leave it uninitialised

    @staticmethod
    def check(model: nn.Module, optimizer: Optimizer, method: Method, device: torch.device) -> None:
        """Accepts everything."""

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch; see `Step`."""
        images, labels = self._options.collate(*batch)
        self._optimizer.zero_grad(set_to_none=True)
        if self._guard is not None:
            self._guard.save_buffers()
        with autocast(self._options.device, self._options.precision):
            loss, own = self._losses(images, labels)
        penalty = self._method.penalty(loss)
        penalised, objective = (loss, own) if penalty is None else (loss + penalty, own + penalty)
        (objective if self._scaler is None else self._scaler.scale(objective)).backward()
        if self._guard is not None:
            self.skipped = self._guard.step(penalised.detach(), self._scaler)
        elif self._scaler is not None:
            self._scaler.step(self._optimizer)
            self.skipped = overflowed(self._scaler, self._optimizer)
        else:
            self._optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        return loss.detach()

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mini-batch's mean loss, and what this process differentiates: here the same."""
        loss = F.cross_entropy(self._model(images), labels)
        return loss, loss


class DistributedStep(EagerStep):
    """The step of one of several processes on its shard: up to rounding that of one process on the whole mini-batch.

    Shards may differ in size, and be empty. Normalisation layers use the statistics of the shard, unless they are
    synchronised. What the network draws at random (dropout) differs from process to process.
    """

    def __init__(self, optimizer: Optimizer, method: Method, options: StepOptions, *, group: TrainingGroup) -> None:
        device_ids = [group.device.index] if group.device.type == "cuda" else None
        super().__init__(method.parallel(device_ids=device_ids), optimizer, method, options)
        self._group = group

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on this process's shard; returns the mean loss over all shards."""
        with self._group.own_random():
            return super().__call__(*batch)

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        own = F.cross_entropy(self._model(images), labels, reduction="sum")
        count = torch.full((), len(labels), dtype=own.dtype, device=own.device)
        total, count = self._group.sum(torch.stack((own.detach(), count))).unbind()
        # DDP divides the sum of the gradients by the number of processes.
        return total / count, own * (self._group.world / count)


class Guard:
    """The optimizer's part of a step, which changes nothing if the loss or a gradient is not finite.

    A fused optimizer reads `found_inf` on the device, as local learning does; for another one the host has to read it.
    Buffers, such as running statistics, that the forward pass has changed are restored.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._is_fused = all(group.get("fused") for group in optimizer.param_groups)
        self._one = torch.ones((), device=device)
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._before: dict[torch.dtype, Tensor] = {}

    def save_buffers(self) -> None:
        """Copies the buffers; to be called before the forward pass."""
        self._before = {dtype: _flat(buffers) for dtype, buffers in self._buffers.items()}

    @torch.no_grad()
    def step(self, loss: Tensor, scaler: GradScaler | None) -> Tensor:
        """Steps the optimizer, unless `loss`, 0-d, or a gradient is not finite.

        Returns:
            Whether the step was skipped, 0-d on the device.
        """
        gradients = [
            parameter.grad
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if scaler is None:
            skipped = self._step_if_finite(loss, gradients)
        else:
            # The scaler checks only gradients, so one of them carries the loss.
            gradients[0].mul_(torch.where(loss.isfinite(), 1.0, torch.nan))
            scaler.step(self._optimizer)
            skipped = overflowed(scaler, self._optimizer)
        for dtype, buffers in self._buffers.items():
            kept = torch.where(skipped, self._before[dtype], _flat(buffers)).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(kept, buffers, strict=True)])
        return skipped

    def _step_if_finite(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        found = (~loss.isfinite()).float()
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
        for group in by_dtype.values():  # one kernel; a scale of one changes nothing
            torch._amp_foreach_non_finite_check_and_unscale_(group, found, self._one)
        if self._is_fused:
            self._optimizer.found_inf = found  # type: ignore[attr-defined]
            try:
                self._optimizer.step()
            finally:
                del self._optimizer.found_inf  # type: ignore[attr-defined]
        elif not bool(found):
            self._optimizer.step()
        return found > 0


def overflowed(scaler: GradScaler, optimizer: Optimizer) -> Tensor:
    """Whether `scaler` skipped the last step of `optimizer`, 0-d on the device."""
    found = scaler._found_inf_per_device(optimizer)
    return torch.stack([flag.reshape(()) for flag in found.values()]).sum() > 0


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
