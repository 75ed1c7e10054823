"""A network's layers in execution order: their sizes, FLOPs and followers."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.discovery import trace
from lowcal.layers import recurring_block
from lowcal.models import build_model, check_input
from lowcal.schedule import cap, interval

MAX_FRACTION = 0.75  # Sec. 2.2


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        index: its number, from 1, in execution order.
        weight: the shape of its weight.
        parameters: its own, bias included.
        flops: of the forward pass on one image; a multiplication with its addition counts as two.
        followers: parameters outside the layer that leave SGD with it.
    """

    index: int
    name: str
    kind: str
    weight: tuple[int, ...]
    parameters: int
    flops: int
    followers: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """A network's layers, and the moves of the default schedule in a training of `epochs` epochs.

    Attributes:
        shift: t_shift, layers per move.
        interval: K, the least number of epochs between moves (Eq. 2).
        most_local: the largest boundary, in layers.
    """

    model: str
    input: tuple[int, int, int]
    epochs: int
    shift: int
    interval: int
    most_local: int
    layers: tuple[LayerRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def describe(name: str, *, classes: int, channels: int, image_size: int, width: int | None, epochs: int) -> Description:
    """The description of the network called `name` for images of `channels` x `image_size` x `image_size`.

    Raises:
        LowcalError: the network is unknown, or it does not take such images.
    """
    model = build_model(name, classes=classes, in_channels=channels, width=width, image_size=image_size)
    shape = (channels, image_size, image_size)
    check_input(model, name, shape, classes)
    order = trace(model, torch.zeros(1, *shape))
    outputs = _output_sizes(model, order.layers, shape)
    rows = []
    for index, layer in enumerate(order.layers, start=1):
        module = model.get_submodule(layer)
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows.append(
            LayerRow(
                index,
                layer,
                type(module).__name__,
                tuple(weight.shape),
                sum(parameter.numel() for parameter in module.parameters(recurse=False)),
                2 * outputs[layer] * weight[0].numel(),
                tuple(follower for follower, leader in order.followers.items() if leader == layer),
            )
        )
    shift = recurring_block(model, order.layers)
    wait = interval(len(rows), shift, epochs, MAX_FRACTION)
    return Description(name, shape, epochs, shift, wait, cap(len(rows), MAX_FRACTION), tuple(rows))


def _output_sizes(model: nn.Module, layers: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, int]:
    """The number of values in each layer's output for one image, from a pass on the meta device."""
    trial = copy.deepcopy(model).to("meta").eval()
    sizes: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: sizes.__setitem__(name, output.numel())

    for name in layers:
        trial.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        trial(torch.empty(1, *shape, device="meta"))
    return sizes
