"""Groups of channels that can only be removed together, from a symbolic trace of the network, and their removal.

A convolution makes the channels that the next layers use. Normalisation, activation, pooling and depthwise convolution
pass them on. A sum ties its operands' channels together. Channels that pass through anything else, and those of the
network's input and output, are never removed.

A parameter that loses channels stays the same object and takes a smaller tensor as its data, so that the optimizer's
groups and the keys of its state stay valid. Its gradient is dropped: the next backward pass makes one of the new size.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lowcal.errors import LowcalError

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_POINTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
)
_POOL_FUNCTIONS = (F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, torch.max_pool2d)
_POINTWISE_FUNCTIONS = (torch.relu, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.dropout, torch.tanh, torch.sigmoid)
_POINTWISE_METHODS = ("relu", "relu_", "tanh", "sigmoid", "contiguous")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Group:
    """Channels that are kept or removed together, by the names of the modules that hold weights for them.

    Attributes:
        channels: how many there are.
        makers: layers of which they are the outputs.
        users: layers of which they are the inputs; a linear layer after flattening has several inputs for each.
        carriers: normalisations and depthwise convolutions, of which they are both.
    """

    channels: int
    makers: tuple[str, ...]
    users: tuple[str, ...]
    carriers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first of its makers, which no other group has."""
        return self.makers[0]

    @property
    def members(self) -> tuple[str, ...]:
        """All its modules."""
        return (*self.makers, *self.users, *self.carriers)


def find_groups(model: nn.Module) -> tuple[Group, ...]:
    """The groups of `model` whose channels can be removed, in the order of the forward pass.

    Raises:
        LowcalError: the network's forward pass cannot be traced, or no channel can be removed.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the trace runs the network's own code, which may fail on symbols in any way
        reason = str(error).partition("\n")[0]
        raise LowcalError(
            f"prune cannot trace the forward pass of {type(model).__name__} ({reason}); use another method or network"
        ) from error
    flow = _Flow(model)
    for node in graph.nodes:
        flow.take(node)
    groups = flow.groups()
    if not groups:
        raise LowcalError(
            f"prune finds no channel in {type(model).__name__} that could be removed; use another method or network"
        )
    return groups


def cut(model: nn.Module, optimizer: Optimizer, group: Group, kept: Tensor) -> None:
    """Removes the group's channels but for those in `kept`, wherever they have weights.

    Args:
        model: the network.
        optimizer: its state is cut like the parameters where it has their shape.
        group: its `channels` is what the network has now.
        kept: (n,) int64, the numbers of channels, rising.
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
    """Removes `parameters` and their state from the optimizer."""
    for group in optimizer.param_groups:
        stays = [parameter not in parameters for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [value for value, is_left in zip(group[key], stays, strict=True) if is_left]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


class _Tracer(fx.Tracer):
    """Does not look into classes derived from torch's normalisation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, nn.BatchNorm2d)


@dataclass(eq=False)
class _Channels:
    """A set of channels; `tied_to` is the set that it became a part of."""

    count: int
    is_fixed: bool = False
    makers: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    carriers: list[str] = field(default_factory=list)
    tied_to: _Channels | None = None

    def root(self) -> _Channels:
        return self if self.tied_to is None else self.tied_to.root()


@dataclass(frozen=True)
class _Value:
    """A tensor in the trace: its channels, and whether they are the last dimension, (N, channels x positions)."""

    channels: _Channels
    is_flat: bool = False


class _Flow:
    """Follows channels from node to node."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._values: dict[fx.Node, _Value] = {}
        self._all: list[_Channels] = []
        self._ends: dict[str, tuple[_Value, _Value]] = {}  # a module's input and output
        weights = [id(module._parameters.get("weight")) for module in self._modules.values()]
        self._shared = {key for key in weights if key != id(None) and weights.count(key) > 1}

    def take(self, node: fx.Node) -> None:
        """Notes what the node does to channels."""
        result = self._result(node)
        if result is None:
            for source in node.all_input_nodes:
                self._values[source].channels.root().is_fixed = True
            result = self._new(0, is_fixed=True)
        self._values[node] = result

    def groups(self) -> tuple[Group, ...]:
        """The groups that may lose channels."""
        return tuple(
            Group(
                channels.count,
                tuple(dict.fromkeys(channels.makers)),
                tuple(dict.fromkeys(channels.users)),
                tuple(dict.fromkeys(channels.carriers)),
            )
            for channels in self._all
            if channels.tied_to is None and not channels.is_fixed and channels.makers
        )

    def _result(self, node: fx.Node) -> _Value | None:
        """The node's output; None if it does something that is not known here."""
        source = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return None
        if node.op == "call_module":
            return self._through_module(str(node.target), source)
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in _ADDITIONS:
            return self._sum(node, source)
        if node.target in (torch.flatten, "flatten"):
            return self._flattened(node.args[1:], node.kwargs, source)
        if node.target in (torch.mean, "mean"):
            over_positions = node.args[1:] in (((2, 3),), ([2, 3],), ((-2, -1),), ([-2, -1],))
            is_known = over_positions and not node.kwargs and not source.is_flat
            return _Value(source.channels, is_flat=True) if is_known else None
        if node.target in _POOL_FUNCTIONS:
            return None if source.is_flat else source
        return source if node.target in (*_POINTWISE_FUNCTIONS, *_POINTWISE_METHODS) else None

    def _through_module(self, name: str, source: _Value) -> _Value | None:
        module = self._modules[name]
        if isinstance(module, nn.Flatten):
            return self._flattened((module.start_dim, module.end_dim), {}, source)
        if isinstance(module, _POINTWISE):
            return source
        if isinstance(module, _POOLS):
            return None if source.is_flat else source
        if type(module) not in (*_CONVS, nn.Linear) and not isinstance(module, _NormBase):
            return None
        if id(module._parameters.get("weight")) in self._shared or not self._fits(module, source):
            return None
        output = self._past_weight(name, module, source)
        if output is None:
            return None
        if name in self._ends:  # it runs twice, with the same weights
            for earlier, now in zip(self._ends[name], (source, output), strict=True):
                self._tie(earlier, now)
        self._ends[name] = source, output
        return output

    def _fits(self, module: nn.Module, source: _Value) -> bool:
        """Whether the source's channels are what the module takes; a count of 0 is unknown and fits."""
        count = source.channels.root().count
        if isinstance(module, nn.Linear):
            return source.is_flat and (not count or module.in_features % count == 0)
        if isinstance(module, _NormBase):
            return not count or module.num_features % count == 0
        return not source.is_flat

    def _past_weight(self, name: str, module: nn.Module, source: _Value) -> _Value | None:
        channels = source.channels.root()
        if isinstance(module, nn.Linear):
            channels.users.append(name)
            return self._new(module.out_features, maker=name, is_flat=True)
        if isinstance(module, _CONVS):
            if module.groups == 1:
                channels.users.append(name)
                return self._new(module.out_channels, maker=name)
            if not module.groups == module.in_channels == module.out_channels:
                return None
        channels.carriers.append(name)
        return source

    def _flattened(self, args: Any, kwargs: Any, source: _Value) -> _Value | None:
        if source.is_flat or kwargs or tuple(args) not in ((1,), (1, -1)):
            return None
        return _Value(source.channels, is_flat=True)

    def _sum(self, node: fx.Node, first: _Value) -> _Value | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        other = node.args[1]
        if not isinstance(other, fx.Node):
            return first
        self._tie(first, self._values[other])
        return first

    def _new(self, count: int, *, maker: str | None = None, is_fixed: bool = False, is_flat: bool = False) -> _Value:
        channels = _Channels(count, is_fixed, makers=[maker] if maker else [])
        self._all.append(channels)
        return _Value(channels, is_flat)

    def _tie(self, one: _Value, two: _Value) -> None:
        first, second = one.channels.root(), two.channels.root()
        if first is second:
            return
        if self._all.index(second) < self._all.index(first):
            first, second = second, first
        agree = one.is_flat == two.is_flat and first.count == second.count
        first.is_fixed |= second.is_fixed or not agree
        first.makers += second.makers
        first.users += second.users
        first.carriers += second.carriers
        second.tied_to = first


def _spread(kept: Tensor, positions: int) -> Tensor:
    """The numbers of the inputs that belong to the channels `kept`; each channel has `positions` inputs."""
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
    """Sets the layer's attributes for its size: `inputs`, `outputs`, `groups`."""
    unit = "features" if isinstance(layer, nn.Linear) else "channels"
    attributes = {"inputs": f"in_{unit}", "outputs": f"out_{unit}", "groups": "groups"}
    for key, size in sizes.items():
        setattr(layer, attributes[key], size)
