"""Cutting channels out of a network and its optimizer, in place.

A parameter stays the same object and takes a smaller tensor as its data, so that the optimizer's groups and the keys of
its state hold on without being written anew; its gradient is dropped, for the next backward pass makes one of its size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lowcal.methods.pruning.groups import Group


def cut(model: nn.Module, optimizer: Optimizer, group: Group, kept: Tensor) -> None:
    """Leaves of the group's channels only those whose numbers are in `kept`, everywhere that they have weights.

    Args:
        model: the network.
        optimizer: of whose state what has a parameter's shape is cut like the parameter.
        group: its `channels` is what the network has now.
        kept: (n,) int64, rising.
    """
    for name in group.makers:
        layer = model.get_submodule(name)
        _cut_tensors(layer, optimizer, 0, kept, ("weight", "bias"))
        _count(layer, outputs=len(kept))
    for name in group.users:
        layer = model.get_submodule(name)
        index = _spread(kept, layer.get_parameter("weight").shape[1] // group.channels)
        _cut_tensors(layer, optimizer, 1, index, ("weight",))
        _count(layer, inputs=len(index))
    for name in group.carriers:
        module = model.get_submodule(name)
        if isinstance(module, _NormBase):
            index = _spread(kept, module.num_features // group.channels)
            _cut_tensors(module, optimizer, 0, index, ("weight", "bias", "running_mean", "running_var"))
            module.num_features = len(index)
        else:
            _cut_tensors(module, optimizer, 0, kept, ("weight", "bias"))
            _count(module, inputs=len(kept), outputs=len(kept), groups=len(kept))


def drop_parameters(optimizer: Optimizer, parameters: set[nn.Parameter]) -> None:
    """Takes `parameters` out of the optimizer's groups, and their state with them."""
    for group in optimizer.param_groups:
        stays = [parameter not in parameters for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [value for value, is_left in zip(group[key], stays, strict=True) if is_left]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _spread(kept: Tensor, positions: int) -> Tensor:
    """The numbers of the inputs that belong to the channels `kept`, of which each has `positions`."""
    if positions == 1:
        return kept
    return (kept.unsqueeze(1) * positions + torch.arange(positions, device=kept.device)).flatten()


def _cut_tensors(module: nn.Module, optimizer: Optimizer, axis: int, index: Tensor, names: tuple[str, ...]) -> None:
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        index = index.to(tensor.device)
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                state[key] = _taken(value, axis, index)
        tensor.data = _taken(tensor.detach(), axis, index)
        tensor.grad = None


def _taken(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    taken = tensor.index_select(axis, index)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _count(layer: nn.Module, **sizes: int) -> None:
    """Sets the layer's own account of its size: `inputs`, `outputs`, `groups`."""
    unit = "features" if isinstance(layer, nn.Linear) else "channels"
    attributes = {"inputs": f"in_{unit}", "outputs": f"out_{unit}", "groups": "groups"}
    for key, size in sizes.items():
        setattr(layer, attributes[key], size)
