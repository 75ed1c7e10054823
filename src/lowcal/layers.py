"""The weight layers of a network in the order in which its forward pass runs them.

A layer is a module that multiplies its input by a weight: linear, or 1d, 2d or 3d convolution. The order of execution
is a topological order of the network, so the first layers in it depend on no later layer. When they need no gradient,
back-propagation stops after them, in residual networks too. Every other parameter follows a layer: the last one that
ran before the forward pass first used the parameter. A layer with adapters of peft is one layer, with all in it.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from lowcal.errors import LowcalError

LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Order:
    """The layers of a network by name in execution order, and what moves with each.

    Attributes:
        layers: names of the layers, first to last.
        followers: for each parameter that is not a layer's own, the layer it follows.
        norms: for each normalisation module with running statistics, the layer it follows.
        limits: for each layer that cannot become local, the reason, a sentence for the user.
    """

    layers: tuple[str, ...] = ()
    followers: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    def merged(self, other: Order) -> Order:
        """This order, with each layer that only `other` ran inserted after the layer that it followed there.

        Raises:
            LowcalError: the place of such a layer is unknown, since `other` left out layers around it.
        """
        names = list(self.layers)
        last = -1  # place of the last layer that both ran, or that was put in
        for position, name in enumerate(other.layers):
            if name in names:
                last = names.index(name)
                continue
            after = next((names.index(later) for later in other.layers[position:] if later in names), len(names))
            if after - last > 1:
                raise LowcalError(
                    f"the place of layer '{name}' in the order of execution is not known, since the pass that ran it "
                    f"left out '{names[last + 1]}'; give LoCal example_inputs with which every layer runs"
                )
            last += 1
            names.insert(last, name)
        return Order(
            tuple(names),
            {**other.followers, **self.followers},
            {**other.norms, **self.norms},
            {**other.limits, **self.limits},
        )

    def check_reach(self, boundary: int) -> None:
        """Checks that each of the first `boundary` layers can become local.

        Raises:
            LowcalError: one cannot.
        """
        for name in self.layers[:boundary]:
            if name in self.limits:
                raise LowcalError(self.limits[name])


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that can be layers, by name; a forward pass shows which of them run, and when.

    Raises:
        LowcalError: there are none, or one is lazy and not yet materialised.
    """
    layers: dict[str, nn.Module] = {}
    adapted = "."  # the prefix of names in the last layer with adapters
    for name, module in model.named_modules():
        if name.startswith(adapted):
            continue
        if is_adapted(module):
            adapted = f"{name}."
            if any(isinstance(part, LAYER_TYPES) for part in module.modules()):
                layers[name] = module
        # Attention's output projection is never called as a module: its weight is part of a fused product.
        elif isinstance(module, LAYER_TYPES) and not isinstance(module, NonDynamicallyQuantizableLinear):
            layers[name] = module
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
    return layers


def is_adapted(module: nn.Module) -> bool:
    """Whether `module` is a layer to which peft has added adapters (LoRA and others)."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # loaded if the network has adapters
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def weight_of(layer: nn.Module) -> nn.Parameter | None:
    """The weight of `layer` if it is a parameter; None if it is computed from other parameters."""
    return layer._parameters.get("weight")


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """The weight of `layer`, if it is a parameter; of a layer with adapters all parameters that are not quantised."""
    if is_adapted(layer):
        return [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
    weight = weight_of(layer)
    return [] if weight is None else [weight]


def parameters_of(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of `layer`; those of modules in it belong to a layer with adapters only."""
    return list(layer.parameters(recurse=is_adapted(layer)))


def own_parameters(order: Order, model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """For each layer in `order`, the parameters that SGD stops training with it: its own, then its followers."""
    parameters = {name: parameters_of(model.get_submodule(name)) for name in order.layers}
    for follower, layer in order.followers.items():
        parameters[layer].append(model.get_parameter(follower))
    return parameters


def recurring_block(model: nn.Module, layers: tuple[str, ...]) -> int:
    """The default of t_shift (Sec. 2.2): the layers in the network's recurring block, at least 5% of its depth.

    The recurring block is a class of modules most of whose instances hold the same number of layers. Of several such
    classes it is the one that covers most layers. A shift of one shallow block is repeated until it is at least 5% of
    the depth. A network without a recurring block (VGG) shifts by 7.5% of its layers.
    """
    depth = len(layers)
    found = _recurring_class(model, layers)
    if found is None:
        return max(1, round(0.075 * depth))
    _, block = found
    return block * max(1, -(-depth // (20 * block)))


def block_ends(model: nn.Module, layers: tuple[str, ...]) -> tuple[int, ...]:
    """The positions from 1 to L at which a boundary is not inside a recurring block."""
    found = _recurring_class(model, layers)
    within: set[int] = set()
    for name, module in model.named_modules():
        if found is not None and type(module) is found[0]:
            inside = [index for index, layer in enumerate(layers) if layer.startswith(f"{name}.")]
            within.update(range(min(inside, default=0) + 1, max(inside, default=0) + 1))
    return tuple(position for position in range(1, len(layers) + 1) if position not in within)


def _recurring_class(model: nn.Module, layers: tuple[str, ...]) -> tuple[type, int] | None:
    """The class of the network's recurring block, and the usual number of layers in it; None without one."""
    coverage: dict[type, tuple[int, int]] = {}  # class -> layers covered, usual number of layers in one
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


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores modes, buffers and random generators of `model` at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
