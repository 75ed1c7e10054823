"""Each layer has one controller at most."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn

from lowcal.errors import LowcalError

# The controller of each layer that has one; neither is kept alive by it.
_controllers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


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
