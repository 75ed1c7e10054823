"""The weight layers of a network in the order in which its forward pass runs them.

A layer is a module whose weight is a matrix product: linear, 1d, 2d and 3d convolution. The order of execution is a
topological order of the network, so any prefix of it is closed under ancestors: when a prefix needs no gradient,
back-propagation stops at its end, in residual networks too. Every other parameter follows the layer that the forward
pass ran last before it first used that parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError

LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Order:
    """The layers of a network by name in execution order, and what moves with each.

    Attributes:
        layers: names of the layers, first to last.
        followers: for each parameter that is not a layer's own, the layer it follows.
        norms: for each normalisation module with running statistics, the layer it follows.
    """

    layers: tuple[str, ...] = ()
    followers: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)

    def merged(self, other: Order) -> Order:
        """This order with the layers that only `other` ran put after those they ran behind."""
        names = list(self.layers)
        for position, name in enumerate(other.layers):
            if name not in names:
                names.insert(names.index(other.layers[position - 1]) + 1 if position else 0, name)
        return Order(tuple(names), {**other.followers, **self.followers}, {**other.norms, **self.norms})


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that can be layers, by name; which of them run, and when, only a forward pass tells.

    Raises:
        LowcalError: there is none, one is lazy and not yet materialised, or one has a parametrised weight.
    """
    # Attention's output projection is never called as a module: its weight goes into one fused product.
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYER_TYPES) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            owner = name.rpartition(".")[0]
            raise LowcalError(
                f"layer '{owner}' is lazy and has no weight yet; "
                "run one forward pass before LoCal and the optimizer are built"
            )
    if not layers:
        raise LowcalError(
            f"{type(model).__name__} has no linear or convolution layer, so there is nothing to learn locally; "
            "pass the network that holds the layers"
        )
    for name, module in layers.items():
        if module._parameters.get("weight") is None:
            raise LowcalError(
                f"layer '{name}' computes its weight from other parameters, which a local update cannot set; "
                "remove the parametrization before LoCal is built (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    return layers


def runs_twice(name: str) -> str:
    """What is said of a layer that one forward pass runs twice."""
    return (
        f"layer '{name}' runs twice in one forward pass, so it has no single input and output to learn from; "
        "give each use a module of its own"
    )


class Tracer(TorchFunctionMode):
    """Watches one forward pass of `model` while it is entered; `order()` then tells what ran when."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layers = {module: name for name, module in weight_layers(model).items()}
        self._modules = {module: name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._ran: list[str] = []
        self._used: dict[str, int] = {}  # parameter -> layers that had run when it was first used
        self._started: dict[str, int] = {}  # module -> layers that had run when its forward began
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Tracer:
        for module in self._modules:
            if module in self._layers or module._parameters or isinstance(module, _NormBase):
                self._handles.append(module.register_forward_pre_hook(self._enter_module))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._started.setdefault(self._modules[module], len(self._ran))
        name = self._layers.get(module)
        if name is None:
            return
        if name in self._ran:
            raise LowcalError(runs_twice(name))
        self._ran.append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":  # reading .shape or .dtype is no use of a parameter
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self._parameters:
                    self._used.setdefault(self._parameters[id(leaf)], len(self._ran))
        return func(*args, **kwargs)

    def order(self) -> Order:
        """What the watched pass ran.

        Raises:
            LowcalError: it ran no layer, or two of its layers share one weight.
        """
        if not self._ran:
            raise LowcalError(
                "the forward pass ran no linear or convolution layer as a module, so nothing can learn locally; "
                "call the layers, not their weights"
            )
        modules = {name: module for module, name in self._layers.items()}
        owners: dict[int, str] = {}
        own: set[int] = set()
        for name in self._ran:
            first = owners.setdefault(id(modules[name].weight), name)
            if first != name:
                raise LowcalError(
                    f"layers '{first}' and '{name}' share one weight, which cannot learn both locally and by SGD; "
                    "give each layer a weight of its own"
                )
            own |= {id(parameter) for parameter in modules[name].parameters(recurse=False)}
        followers: dict[str, str] = {}
        for key, name in self._parameters.items():
            seen = self._used.get(name, self._started.get(name.rpartition(".")[0]))
            if key not in own and seen is not None:
                followers[name] = self._ran[max(seen - 1, 0)]
        norms = {
            name: self._ran[max(self._started[name] - 1, 0)]
            for module, name in self._modules.items()
            if isinstance(module, _NormBase) and name in self._started
        }
        return Order(tuple(self._ran), followers, norms)


def trace(model: nn.Module, example_inputs: Any) -> Order:
    """The order found by one forward pass of `model` on `example_inputs`.

    The pass leaves the model and the random generators as they were. It runs in training mode, so that
    layers used in training alone are seen, but normalises by running statistics, so that one example is enough.

    Args:
        example_inputs: one tensor, a tuple of positional arguments, or a dict of keyword arguments.
    """
    positional = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    keywords = example_inputs if isinstance(example_inputs, dict) else {}
    with _unchanged(model), torch.no_grad(), Tracer(model) as tracer:
        model(*(() if keywords else positional), **keywords)
    return tracer.order()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        model.train()
        for module in modes:
            if isinstance(module, _NormBase):
                module.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def own_parameters(order: Order, model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """For each layer in `order` the parameters that leave SGD with it: its own first, then its followers."""
    parameters = {name: list(model.get_submodule(name).parameters(recurse=False)) for name in order.layers}
    for follower, layer in order.followers.items():
        parameters[layer].append(model.get_parameter(follower))
    return parameters


def recurring_block(model: nn.Module, layers: tuple[str, ...]) -> int:
    """The default of t_shift (Sec. 2.2): the layers in the network's recurring block, at least 5% of its depth.

    The recurring block is the class of module of which most instances hold the same number of layers and which
    together cover most of the network; a shallow block counts as often as 5% of the depth asks for. A network
    without one (VGG) shifts by 7.5% of its layers.
    """
    depth = len(layers)
    found = _recurring_class(model, layers)
    if found is None:
        return max(1, round(0.075 * depth))
    _, block = found
    return block * max(1, -(-depth // (20 * block)))


def block_ends(model: nn.Module, layers: tuple[str, ...]) -> tuple[int, ...]:
    """The positions in `layers` that cut no recurring block: after 1 to L layers, but not within a block."""
    found = _recurring_class(model, layers)
    within: set[int] = set()
    for name, module in model.named_modules():
        if found is not None and type(module) is found[0]:
            inside = [index for index, layer in enumerate(layers) if layer.startswith(f"{name}.")]
            within.update(range(min(inside, default=0) + 1, max(inside, default=0) + 1))
    return tuple(position for position in range(1, len(layers) + 1) if position not in within)


def _recurring_class(model: nn.Module, layers: tuple[str, ...]) -> tuple[type, int] | None:
    """The class of the network's recurring block, and the layers in its commonest instance; None without one."""
    coverage: dict[type, tuple[int, int]] = {}  # class -> layers covered, layers in its commonest instance
    by_class: dict[type, list[int]] = {}
    for name, module in model.named_modules():
        inside = sum(layer.startswith(f"{name}.") for layer in layers)
        if name and inside and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            by_class.setdefault(type(module), []).append(inside)
    for kind, sizes in by_class.items():
        size, alike = Counter(sizes).most_common(1)[0]
        if len(sizes) > 1 and 2 * alike > len(sizes):
            coverage[kind] = (sum(sizes), size)
    if not coverage:
        return None
    kind = max(coverage, key=coverage.__getitem__)
    return kind, coverage[kind][1]
