"""The methods that `lowcal compare` compares, behind one protocol."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods.base import Method
from lowcal.methods.freeze import Freeze
from lowcal.methods.local import Local
from lowcal.methods.settings import LocalSettings, ScheduleSettings
from lowcal.methods.sgd import SGD

__all__ = ["METHODS", "LocalSettings", "Method", "ScheduleSettings", "build_method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (SGD, Local, Freeze)}


def build_method(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    settings: LocalSettings,
    *,
    epochs: int,
    example_inputs: Tensor,
) -> Method:
    """The method called `name`, attached to the network; the arguments are those of `Method`.

    Raises:
        LowcalError: there is no such method, or it does not apply to this network.
    """
    if name not in METHODS:
        raise LowcalError(f"there is no method {name!r}{nearest(name, METHODS)}")
    return METHODS[name](model, optimizer, settings, epochs=epochs, example_inputs=example_inputs)
