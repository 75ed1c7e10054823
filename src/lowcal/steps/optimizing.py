"""The second half of a training step: the backward pass and the optimizers' steps. It does not wait for the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer


class OptimizerStep:
    """Steps the optimizers by the gradients: scaled back, clipped, and only if they are finite, as asked for.

    A skipped step changes neither weights nor optimizer state. With a guard the loss counts too, and buffers that the
    forward pass has changed, such as running statistics, are restored. A fused optimizer reads on the device whether to
    skip (`found_inf`), as local updates do. For another one the host has to read it. The gradient scaler's own `step`
    is not used: it knows nothing of the loss, and reads from the device under some optimizers.

    Args:
        model: the network.
        optimizers: of its parameters, all on one device.
        scaler: scales the loss, so that gradients in half precision do not vanish; None: nothing is scaled.
        guard: whether a step whose loss or gradient is NaN or infinite is skipped. With a scaler, gradients always
            count.
        max_norm: gradients with a larger norm over all parameters are scaled down to it; None: they are not clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: GradScaler | None = None,
        *,
        guard: bool = False,
        max_norm: float | None = None,
    ) -> None:
        self._optimizers, self._scaler, self._max_norm = optimizers, scaler, max_norm
        self._may_skip = guard or scaler is not None
        self._guard = guard
        self._buffers = _by_dtype(model.buffers()) if guard else {}
        self._before: dict[torch.dtype, Tensor] = {}
        if self._may_skip:
            for optimizer in optimizers:
                fill_momentum(optimizer)  # a skipped first step would leave it uninitialised

    def begin(self) -> None:
        """Drops the gradients and copies the buffers; to be called before the forward pass."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._before = {dtype: _flat(buffers) for dtype, buffers in self._buffers.items()}

    def backward(self, objective: Tensor) -> None:
        """Adds the gradients of `objective`, 0-d."""
        (objective if self._scaler is None else self._scaler.scale(objective)).backward()

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor | None:
        """Steps the optimizers after the last backward pass.

        Args:
            loss: 0-d; a guard skips the step if it is not finite.

        Returns:
            Whether the step was skipped, 0-d on the device; None if that cannot happen.
        """
        found = self._unscale(loss) if self._may_skip else None
        if self._max_norm is not None:
            clip_grad_norm_(list(self._parameters()), self._max_norm)
        for optimizer in self._optimizers:
            _step(optimizer, found)
        if found is None:
            return None
        if self._scaler is not None:
            scaler = self._scaler
            torch._amp_update_scale_(
                *scaler._check_scale_growth_tracker("update"),
                found,
                scaler.get_growth_factor(),
                scaler.get_backoff_factor(),
                scaler.get_growth_interval(),
            )
        skipped = found > 0
        self._restore_buffers(skipped)
        return skipped

    def _unscale(self, loss: Tensor) -> Tensor:
        """Scales the gradients back; returns 1 if a gradient, or with a guard the loss, is not finite, else 0."""
        found = (~loss.isfinite()).float() if self._guard else torch.zeros((), device=loss.device)
        if self._scaler is None:
            inverse = torch.ones((), device=loss.device)
        else:
            inverse = self._scaler._check_scale_growth_tracker("step")[0].double().reciprocal().float()
        for gradients in _by_dtype(p.grad for p in self._parameters() if p.grad is not None).values():
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)  # one kernel
        return found

    def _parameters(self) -> Iterator[nn.Parameter]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _restore_buffers(self, skipped: Tensor) -> None:
        for dtype, buffers in self._buffers.items():
            kept = torch.where(skipped, self._before[dtype], _flat(buffers)).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(kept, buffers, strict=True)])


def _step(optimizer: Optimizer, found: Tensor | None) -> None:
    """Steps `optimizer`, unless `found` is 1."""
    if found is None:
        optimizer.step()
    elif is_fused(optimizer):
        optimizer.found_inf = found  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(found):
        optimizer.step()


def is_fused(optimizer: Optimizer) -> bool:
    """Whether one kernel steps all parameters, which can also skip the step by what it reads on the device."""
    return all(group.get("fused") for group in optimizer.param_groups)


def fill_momentum(optimizer: Optimizer) -> None:
    """Gives a momentum of zero to parameters for which a fused SGD has none yet; its first step stays the same.

    Its kernel takes the momentum of all parameters or of none, and if it skips the first step, as the gradient scaler
    may ask for, it leaves what it allocated for it unwritten (torch 2.15).
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, SGD) and group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _by_dtype(tensors: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
