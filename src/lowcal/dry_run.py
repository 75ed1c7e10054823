"""Dry runs of training steps, which compute nothing: the memory that a step needs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lowcal.budget import Budget
from lowcal.layers import Order
from lowcal.rules import Rule
from lowcal.step_times import Trial

META = torch.device("meta")


def held_boundary(
    budget: Budget, model: nn.Module, optimizers: Sequence[Optimizer], order: Order, rule: Rule, inputs: Any
) -> int:
    """The boundary of a budget of memory, on the mini-batch `inputs`; see `step_bytes`."""
    return budget.held(len(order.layers), partial(step_bytes, model, optimizers, order, rule, inputs))


def step_bytes(
    model: nn.Module, optimizers: Sequence[Optimizer], order: Order, rule: Rule, inputs: Any, boundary: int
) -> int:
    """Most bytes that tensors hold at a time in a training step at `boundary`, without autocast.

    Args:
        inputs: a mini-batch: a tensor, a tuple of arguments or a dict of keyword arguments of the model.
    """
    with torch.random.fork_rng([]), LiveBytes() as live:
        copied, copies = empty_copies(model, optimizers, META)
        inputs = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device=META), inputs)
        trial = Trial(copied, order, rule)
        trial.move_to(boundary)
        for optimizer in copies:
            make_state(optimizer)
        live.peak = live.now
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        trial(*(((), inputs) if isinstance(inputs, dict) else (args, {})), None)
        for optimizer in copies:
            optimizer.step()
        return live.peak


def make_state(optimizer: Optimizer) -> None:
    """Takes an optimizer step without a forward pass, so that the optimizer has all of its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def empty_copies(
    model: nn.Module, optimizers: Sequence[Optimizer], device: torch.device
) -> tuple[nn.Module, list[Optimizer]]:
    """Copies on `device` with the shapes, strides and types of the originals, but no values."""
    empties: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        empties[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    groups = [
        [
            {**_portable(group), "params": [empties[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]
    copied = copy.deepcopy(model, dict(empties))
    return copied, [type(one)(own) for one, own in zip(optimizers, groups, strict=True)]  # type: ignore[call-arg]


def _portable(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's settings without those that select kernels of a device."""
    return {name: value for name, value in group.items() if name not in ("params", "fused", "foreach")}


def _batch_norm(images: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of native_batch_norm: the output, and each channel's mean and deviation if the batch gives them."""
    is_training = next(value for value in rest if isinstance(value, bool))
    kept = images.shape[1] if is_training else 0
    dtype = torch.float32 if images.dtype in (torch.float16, torch.bfloat16) else images.dtype
    return torch.empty_like(images), images.new_empty(kept, dtype=dtype), images.new_empty(kept, dtype=dtype)


def _batch_norm_backward(
    gradient: Tensor, images: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """The shapes of native_batch_norm_backward: the gradients that its last argument asks for."""
    channels = images.shape[1]
    of_images, of_weight, of_bias = rest[-1]
    dtype = images.dtype if weight is None else weight.dtype
    return (
        torch.empty_like(images) if of_images else None,
        images.new_empty(channels, dtype=dtype) if of_weight else None,
        images.new_empty(channels, dtype=dtype) if of_bias else None,
    )


# Without values torch (2.15) decomposes these into dozens of operations in Python, most of the time of a dry run.
_SHORTCUTS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten._native_batch_norm_legit.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages of all tensors that were created while it is entered and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = _SHORTCUTS.get(func, func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # the object lives as long as the storage does
        if key in self._storages:
            return

        def forget(_: Any) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
