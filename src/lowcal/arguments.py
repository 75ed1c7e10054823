"""Checks the networks, optimizers and settings that a user passes; each layer has at most one controller."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowcal.errors import LowcalError, is_count
from lowcal.layers import is_adapted, weights_of
from lowcal.rules import Rule

# The controller of each layer that has one. Weak references keep neither alive.
_controllers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def check_settings(
    epochs: int, norm_stats: str, rule: object, schedule: object, supervision: object
) -> Literal["epoch", "step"]:
    """Checks settings of `LoCal`; returns how ||dW_E|| is measured.

    Raises:
        LowcalError: one is of another kind, or out of range.
    """
    if not is_count(epochs):
        raise LowcalError(f"LoCal: epochs is {epochs!r}; give the number of epochs of the whole training, at least 1")
    if norm_stats not in ("batch", "running"):
        raise LowcalError(f"LoCal: norm_stats is {norm_stats!r}; choose 'batch' or 'running'")
    for name, value, examples in (
        ("rule", rule, "lowcal.Hebbian(), Frozen(), Refresh()"),
        ("schedule", schedule, "lowcal.NormTrend(), Quadratic(c1, c2), Fixed({epoch: layers})"),
        ("supervision", supervision, "lowcal.LossTrend(), None"),
    ):
        if isinstance(value, type) or (name == "rule" and not isinstance(value, Rule)):
            raise LowcalError(f"LoCal: {name} is {value!r}; give an object, such as {examples} or one like them")
    measure: Literal["epoch", "step"] = getattr(schedule, "measure", "epoch")
    if measure not in ("epoch", "step"):
        raise LowcalError(f"LoCal: the schedule's measure is {measure!r}; choose 'epoch' or 'step'")
    return measure


def bare_network(given: Any) -> nn.Module:
    """The network itself, if `given` is one that `torch.compile` returned.

    Raises:
        LowcalError: `given` is not a network, or it is wrapped or sharded for several devices.
    """
    if not isinstance(given, nn.Module):
        raise LowcalError(
            f"LoCal: the model is {type(given).__name__}; give the network first: LoCal(model, optimizer, epochs=90)"
        )
    network = given._modules.get("_orig_mod") or given
    if isinstance(network, (DistributedDataParallel, nn.DataParallel)):
        raise LowcalError(
            f"LoCal: the model is wrapped in {type(network).__name__}; build LoCal on model.module, and call "
            "lowcal.DistributedLoCal(model.module, local) instead of the wrapper"
        )
    check_unsharded(network)
    return network


def check_unsharded(network: nn.Module) -> None:
    """Checks that each parameter is a whole tensor.

    Raises:
        LowcalError: FSDP or tensor parallelism has split one.
    """
    sharding = sys.modules.get("torch.distributed.tensor")
    is_split = sharding is not None and any(isinstance(p, sharding.DTensor) for p in network.parameters())
    # The classes of FSDP 1 and 2 are known by name, since importing them is slow. Parameters are whole during a pass.
    classes = {kind.__name__ for module in network.modules() for kind in type(module).__mro__}
    if is_split or not classes.isdisjoint({"FSDPModule", "FullyShardedDataParallel"}):
        raise LowcalError(
            "LoCal: the model's parameters are sharded (FSDP or tensor parallelism), and a local update needs whole "
            "weights; call lowcal.DistributedLoCal(model, local) on the unsharded model"
        )


def bare_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """The torch optimizers in `given`: one or several, wrapped (as by Accelerate and fastai) or not.

    Raises:
        LowcalError: one is not a torch optimizer, so its steps cannot be observed.
    """
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if not several:
        raise LowcalError("LoCal: the list of optimizers is empty; give those that hold the model's parameters")
    return tuple(_bare(optimizer) for optimizer in several)


def _bare(given: Any) -> Optimizer:
    optimizer, inner = given, _inner(given)
    while inner is not None:
        optimizer, inner = inner, _inner(inner)
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise LowcalError(
            f"LoCal: {type(given).__name__} is not a torch optimizer, so its steps cannot be observed; "
            "give the torch.optim optimizer inside it, or a list of them: LoCal(model, [first, second], ...)"
        )
    return optimizer


def _inner(wrapper: Any) -> Any:
    """The optimizer that `wrapper` has as an attribute; None without one."""
    inner = getattr(wrapper, "optimizer", None) or getattr(wrapper, "opt", None)
    return inner if hasattr(inner, "param_groups") else None


def holder(parameter: nn.Parameter | None, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The first of `optimizers` that holds `parameter`."""
    for optimizer in optimizers:
        if any(held is parameter for group in optimizer.param_groups for held in group["params"]):
            return optimizer
    return None


def first_holder(layers: Iterable[nn.Module], optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The optimizer that holds a weight of the first of `layers` of which one holds a weight."""
    found = (holder(weight, optimizers) for layer in layers for weight in weights_of(layer))
    return next((optimizer for optimizer in found if optimizer is not None), None)


def check_held(
    layers: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], wants: Callable[[nn.Parameter], bool]
) -> None:
    """Checks that `optimizers` hold the weights of `layers` that the user wants to train.

    Raises:
        LowcalError: they do not.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, module in layers.items():
        if any(wants(weight) and id(weight) not in held for weight in weights_of(module)):
            kind = "adapters" if is_adapted(module) else "weight"
            raise LowcalError(
                f"the optimizer does not hold the {kind} of layer '{name}'; build it from the model's own parameters, "
                "as in torch.optim.SGD(model.parameters(), lr=0.1), after the model was moved or changed, "
                "or give LoCal all of several optimizers as a list"
            )


def is_controlled(network: nn.Module) -> bool:
    """Whether a controller has a layer of `network`."""
    found = (_controllers.get(module) for module in network.modules())
    return any(controller is not None and controller() is not None for controller in found)


def check_free(layers: Mapping[str, nn.Module]) -> None:
    """Checks that no controller has one of `layers`.

    Raises:
        LowcalError: one has.
    """
    for name, module in layers.items():
        other = _controllers.get(module)
        if other is not None and other() is not None:
            raise LowcalError(
                f"layer '{name}' already learns under another LoCal; call its detach() first, or use that one"
            )


def claim(layers: Mapping[str, nn.Module], controller: object) -> None:
    """Gives `layers` to `controller` until it releases them or is deleted."""
    for module in layers.values():
        _controllers[module] = weakref.ref(controller)


def release(layers: Mapping[str, nn.Module], controller: object) -> None:
    """Takes `layers` from `controller`, except those that another controller has meanwhile."""
    for module in layers.values():
        holder = _controllers.get(module)
        if holder is not None and holder() is controller:
            del _controllers[module]
