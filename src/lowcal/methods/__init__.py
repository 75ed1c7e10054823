"""The methods that `lowcal compare` compares, behind one protocol."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods.base import SGD, Method
from lowcal.methods.boundary import Freeze, Local, Refresh
from lowcal.methods.prune import Prune
from lowcal.methods.stochastic_depth import StochasticDepth
from lowcal.settings import Settings

__all__ = ["METHODS", "Method", "build_method", "find_method"]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (SGD, Local, Freeze, Refresh, StochasticDepth, Prune)
}


def find_method(name: str) -> type[Method]:
    """The class of the method called `name`.

    Raises:
        LowcalError: there is no such method.
    """
    if "+" in name and set(name.split("+")) <= METHODS.keys():
        raise LowcalError(
            f"unknown method {name!r}: methods cannot be combined yet; "
            f"choose one of them, or compare them with one another as {name.replace('+', ',')}"
        )
    if name not in METHODS:
        raise LowcalError(f"unknown method {name!r}{nearest(name, METHODS)}")
    return METHODS[name]


def build_method(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    settings: Settings,
    *,
    epochs: int,
    example_inputs: Tensor,
    seed: int = 0,
) -> Method:
    """The method called `name`, attached to the network; the arguments are those of `Method`.

    Raises:
        LowcalError: there is no such method, or it does not apply to this network.
    """
    return find_method(name)(model, optimizer, settings, epochs=epochs, example_inputs=example_inputs, seed=seed)
