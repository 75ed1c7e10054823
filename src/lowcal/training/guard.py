"""Steps whose loss or gradient is NaN or infinite: skipped on the device, without the host looking."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer


class Guard:
    """The optimizer's part of a step, in which nothing changes if the loss or a gradient is not finite.

    A fused optimizer is told by its `found_inf`, which local learning heeds too; for another one the host has to look.
    Buffers, such as running statistics, that the forward pass has spoilt are put back.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._is_fused = all(group.get("fused") for group in optimizer.param_groups)
        self._one = torch.ones((), device=device)
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._before: dict[torch.dtype, Tensor] = {}

    def remember(self) -> None:
        """To be called before the forward pass."""
        self._before = {kind: _flat(buffers) for kind, buffers in self._buffers.items()}

    @torch.no_grad()
    def step(self, loss: Tensor, scaler: GradScaler | None) -> Tensor:
        """Steps the optimizer, unless `loss`, 0-d, or a gradient is not finite.

        Returns:
            Whether it did not, 0-d on the device.
        """
        gradients = [
            parameter.grad
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if scaler is None:
            skipped = self._plain_step(loss, gradients)
        else:
            # The scaler looks at gradients alone; one of them tells it of the loss.
            gradients[0].mul_(torch.where(loss.isfinite(), 1.0, torch.nan))
            scaler.step(self._optimizer)
            skipped = overflowed(scaler, self._optimizer)
        for kind, buffers in self._buffers.items():
            kept = torch.where(skipped, self._before[kind], _flat(buffers)).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(kept, buffers, strict=True)])
        return skipped

    def _plain_step(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        found = (~loss.isfinite()).float()
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for group in by_type.values():  # one kernel; a scale of one changes nothing
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
    """Whether `scaler` let `optimizer` skip the step that it has just taken, 0-d on the device."""
    found = scaler._found_inf_per_device(optimizer)
    return torch.stack([flag.reshape(()) for flag in found.values()]).sum() > 0


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
