"""Normalisation layers: by running statistics in training, and by the mini-batch of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from lowcal.hooks import TraceableHook


class RunningNorms:
    """Makes normalisation layers use their running statistics in training, without updating them.

    A normalisation layer does so in evaluation mode, but ``model.train()`` ends that mode. So a hook sets it again
    before each forward pass of the network.

    Args:
        model: the network.

    Attributes:
        handles: the hook's handle.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[RemovableHandle] = []
        self._model = model
        self._norms: Sequence[nn.Module] = ()
        self._stilled: set[nn.Module] = set()  # those that were in training mode; the user set the others

    def take(self, norms: Sequence[nn.Module]) -> None:
        """Sets the layers that use running statistics from the next pass on; `norms` includes earlier ones."""
        if not self.handles:
            self.handles.append(self._model.register_forward_pre_hook(TraceableHook(self._still)))
        self._norms = norms

    def restore(self) -> None:
        """Sets the layers to the network's mode again; remove the hook first."""
        for norm in self._stilled:
            norm.training = self._model.training
        self._stilled.clear()

    def _still(self, module: nn.Module, inputs: Any) -> None:
        for norm in self._norms:
            if norm.training:
                norm.training = False
                self._stilled.add(norm)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the mini-batch of all ranks, whose shards may differ in size and be empty.

    It needs two small all-reduces per step. torch's own `SyncBatchNorm` runs on GPUs only, and its forward
    pass waits for the device.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are (N, C, H, W), N this rank's images."""
        if not self.training or type(x) is not Tensor or x.is_meta or not dist.is_initialized():
            return super().forward(x)
        outputs, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.add_((mean - self.running_mean) * momentum)
                self.running_var.add_((variance * (count / (count - 1)) - self.running_var) * momentum)
        return outputs


def synchronise(model: nn.Module) -> None:
    """Makes every `nn.BatchNorm2d` of `model` normalise over all ranks; parameters, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d


def separate(model: nn.Module) -> None:
    """Undoes `synchronise`."""
    for module in model.modules():
        if type(module) is SyncedBatchNorm2d:
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(x)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        outputs = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return outputs, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        normal = (x - _over_channels(mean)) * _over_channels(scale)
        own = torch.stack((gradient.float().sum((0, 2, 3)), (gradient * normal).float().sum((0, 2, 3))))
        sums = own.clone()
        dist.all_reduce(sums)
        of_bias, of_weight = (_over_channels(part / count) for part in sums)
        slope = _over_channels(scale if weight is None else scale * weight)
        return (
            (slope * (gradient - of_bias - normal * of_weight)).to(x.dtype),
            None if weight is None else own[1].to(weight.dtype),
            None if weight is None else own[0].to(weight.dtype),
            None,
        )


def _over_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (biased) of each channel, (C,), and the number of values in one, 0-d, over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.zeros(world, 2 * x.shape[1] + 1, device=x.device)
    if x.numel():
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        rows[rank] = torch.cat((mean, variance, torch.full((1,), x.numel() / x.shape[1], device=x.device)))
    dist.all_reduce(rows)
    means, variances, counts = rows.split((x.shape[1], x.shape[1], 1), dim=1)
    count = counts.sum()
    parts = counts / count
    mean = (parts * means).sum(0)
    return mean, (parts * (variances + (means - mean) ** 2)).sum(0), count
