"""Who moves a layer's weight: the optimizer that holds it, and one controller at most."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError

# The controller of each layer that has one; neither is kept alive by it.
_controllers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def check_held(layers: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
    """Checks that `optimizer` holds the weight of each of `layers`, but for those that the user froze.

    Raises:
        LowcalError: it does not.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, module in layers.items():
        weight = module.get_parameter("weight")
        if weight.requires_grad and id(weight) not in held:
            raise LowcalError(
                f"the optimizer does not hold the weight of layer '{name}'; build it from the model's own "
                "parameters, as in torch.optim.SGD(model.parameters(), lr=0.1), after the model was moved or changed"
            )


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
    """Gives `layers` to `controller`, until it releases them or is gone."""
    for module in layers.values():
        _controllers[module] = weakref.ref(controller)


def release(layers: Mapping[str, nn.Module], controller: object) -> None:
    """Takes `layers` from `controller`; those that another has meanwhile stay with it."""
    for module in layers.values():
        holder = _controllers.get(module)
        if holder is not None and holder() is controller:
            del _controllers[module]
