"""Per layer, the time of a local update against that of its SGD backward (the paper's Figure 1)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lowcal.discovery import trace
from lowcal.experiments.timing import Work, take_turns
from lowcal.rules import apply_updates, hebbian_update
from lowcal.training.step import PRECISIONS, autocast


@dataclass(frozen=True)
class LayerTime:
    """One layer's times, in milliseconds.

    Attributes:
        local_ms: of Eqs. 3 and 4: the product, its norm, the change of the weight.
        backward_ms: of Eqs. 5 to 7: the gradients of weight and input, the optimizer's step; the first layer, whose
            input needs no gradient, has that of the weight alone.
        ratio: backward_ms / local_ms.
    """

    layer: str
    kind: str
    local_ms: float
    backward_ms: float
    ratio: float


def time_layers(
    model: nn.Module, images: Tensor, *, precision: str, rounds: int, warm_up: int, runs: int | None
) -> list[LayerTime]:
    """Times each layer of `model` by itself, on random input of the size that it has for `images`."""
    order = trace(model, images[:1])
    shapes: dict[str, Tensor] = {}
    twin = copy.deepcopy(model).to("meta").train()
    for name in order.layers:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: shapes.__setitem__(name, args[0])
        )
    with torch.no_grad():
        twin(images.to("meta"))
    times = []
    for index, name in enumerate(order.layers):
        module = copy.deepcopy(model.get_submodule(name))
        # The layer before gives its output in half precision, where that is used.
        dtype = PRECISIONS[precision] if index else None
        inputs = torch.randn_like(shapes[name], dtype=dtype, device=images.device, requires_grad=index > 0)
        with autocast(images.device, precision):
            outputs = module.forward(inputs)  # what its hooks do to the input has been done
        works = {
            "local": Work(_LocalUpdate(module, inputs.detach(), outputs.detach())),
            "backward": Work(_Backward(module, inputs, outputs)),
        }
        taken = take_turns(works, rounds=rounds, warm_up=warm_up, runs=runs, device=images.device)
        local, backward = taken["local"].median, taken["backward"].median
        times.append(LayerTime(name, type(module).__name__, local, backward, backward / local))
    return times


class _LocalUpdate:
    """The local update of one layer."""

    def __init__(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        self._module, self._inputs, self._outputs = module, inputs, outputs
        self._weight: Tensor = module.weight.detach().clone()  # type: ignore[operator]

    def __call__(self) -> None:
        apply_updates([self._weight], [hebbian_update(self._module, self._inputs, self._outputs)], 1e-4)


class _Backward:
    """The backward pass of one layer and the optimizer's step on its weight."""

    def __init__(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        self._outputs = outputs
        self._wanted = [*module.parameters(), *([inputs] if inputs.requires_grad else [])]
        self._gradient = outputs.detach().clone()
        # The optimizer has a weight of its own, since the graph, which is used again, holds the layer's.
        self._weight = nn.Parameter(module.weight.detach().clone())  # type: ignore[operator]
        self._optimizer = SGD([self._weight], lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def __call__(self) -> None:
        gradients = torch.autograd.grad(self._outputs, self._wanted, self._gradient, retain_graph=True)
        self._weight.grad = gradients[0]
        self._optimizer.step()
