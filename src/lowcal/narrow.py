"""torchvision's ResNets and MobileNetV2 with another number of channels, for trials on a small scale."""

from typing import Any

import torch
from torch import nn

__all__ = ["NARROW", "build_narrow"]

NARROW = {"resnet34": 64, "resnet50": 64, "mobilenet_v2": 32}
"""torchvision's networks whose width can be set -> the channels of their first layer as published."""


def build_narrow(name: str, *, classes: int, width: int) -> nn.Module:
    """Build torchvision's network `name`, one of `NARROW`, with `width` channels in its first layer.

    Every other layer's channels are in the same proportion to the published ones; MobileNetV2 rounds them to multiples
    of 8, and its last convolution keeps its 1280 if it would have fewer.
    """
    from torchvision import models

    if name == "mobilenet_v2":
        return models.get_model(name, weights=None, num_classes=classes, width_mult=width / NARROW[name])
    with torch.device("meta"):
        model = models.get_model(name, weights=None, num_classes=classes)
    return _rebuild(model, classes, width)


def _rebuild(model: Any, classes: int, width: int) -> nn.Module:
    """Replace a torchvision ResNet's layers by ones of other widths; those replaced are on the meta device."""
    block, counts = type(model.layer1[0]), [len(getattr(model, f"layer{number}")) for number in (1, 2, 3, 4)]
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for index, count in enumerate(counts):
        stage = model._make_layer(block, width * 2**index, count, stride=1 if index == 0 else 2)
        setattr(model, f"layer{index + 1}", stage)
    model.fc = nn.Linear(8 * width * block.expansion, classes)
    for module in model.modules():  # as torchvision does
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
