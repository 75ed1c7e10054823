"""The residual blocks of a network: the ends of their branches, and the shortcut."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Kind:
    lasts: tuple[str, ...]
    shortcut: str | None = None
    activation: str | bool = False  # a ReLU after the sum, or the name of the module that stands there
    needs_shortcut: bool = False  # whether there is no sum where the shortcut is None


_TWO_DROP_PATHS = _Kind(("drop_path1", "drop_path2"))
# By the name of the forward method, so that a subclass with another one does not count.
_KINDS = {
    "lowcal.models.BasicBlock": _Kind(("norm2",), "shortcut", activation=True),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": _Kind(("drop_path",)),
    "timm.models._efficientnet_blocks.EdgeResidual": _Kind(("drop_path",)),
    "timm.models._efficientnet_blocks.InvertedResidual": _Kind(("drop_path",)),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": _Kind(("drop_path",)),
    "timm.models.convnext.ConvNeXtBlock": _Kind(("drop_path",), "shortcut"),
    "timm.models.regnet.Bottleneck": _Kind(("drop_path",), "downsample", activation="act3", needs_shortcut=True),
    "timm.models.swin_transformer.SwinTransformerBlock": _TWO_DROP_PATHS,
    "timm.models.vision_transformer.Block": _TWO_DROP_PATHS,
    "torchvision.models.convnext.CNBlock": _Kind(("stochastic_depth",)),
    "torchvision.models.efficientnet.FusedMBConv": _Kind(("block",)),
    "torchvision.models.efficientnet.MBConv": _Kind(("block",)),
    "torchvision.models.mobilenetv2.InvertedResidual": _Kind(("conv",)),
    "torchvision.models.mobilenetv3.InvertedResidual": _Kind(("block",)),
    "torchvision.models.regnet.ResBottleneckBlock": _Kind(("f",), "proj", activation="activation"),
    "torchvision.models.resnet.BasicBlock": _Kind(("bn2",), "downsample", activation=True),
    "torchvision.models.resnet.Bottleneck": _Kind(("bn3",), "downsample", activation=True),
    "torchvision.models.swin_transformer.SwinTransformerBlock": _Kind(("attn", "mlp")),
    "torchvision.models.swin_transformer.SwinTransformerBlockV2": _Kind(("norm1", "norm2")),
}
_SKIPS = ("use_res_connect", "has_skip")  # False in an inverted block without a sum


@dataclass(frozen=True)
class ResidualBlock:
    """A module that computes activation(branch(x) + shortcut(x)), or several such sums one after another.

    Attributes:
        name: of the block in its network.
        module: the block.
        lasts: of each sum the branch's last module; its output is added to the shortcut's.
        shortcut_name: the shortcut's name in the block; None if it is the identity.
        activation: whether a ReLU follows the sum.
    """

    name: str
    module: nn.Module
    lasts: tuple[nn.Module, ...]
    shortcut_name: str | None
    activation: bool

    def without_branch(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the block computes with its branches removed, (N, ...). Masks and the like are for the branches."""
        if self.shortcut_name is not None:
            x = self.module.get_submodule(self.shortcut_name)(x)
        # Not in place: x may be the output of the block before, which that block needs for its backward pass.
        return torch.relu(x) if self.activation else x

    def rest(self) -> nn.Module:
        """A module that computes `without_branch`; the shortcut keeps its name in it."""
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        if self.shortcut_name is not None:
            modules[self.shortcut_name] = self.module.get_submodule(self.shortcut_name)
        if self.activation:
            modules["relu"] = nn.ReLU()
        return nn.Sequential(modules)


def residual_blocks(model: nn.Module) -> list[ResidualBlock]:
    """The residual blocks of `model`, ours, timm's and torchvision's, in the order of their registration."""
    blocks = []
    for name, module in model.named_modules():
        forward = type(module).forward
        kind = _KINDS.get(f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward"))
        if kind is None or not all(getattr(module, attribute, True) for attribute in _SKIPS):
            continue
        activates = kind.activation
        if isinstance(activates, str):
            activation = module.get_submodule(activates)
            activates = isinstance(activation, nn.ReLU)
            if not (activates or isinstance(activation, nn.Identity)):
                continue
        shortcut = kind.shortcut
        if shortcut is not None and getattr(module, shortcut) is None:
            if kind.needs_shortcut:
                continue
            shortcut = None
        lasts = tuple(module.get_submodule(last) for last in kind.lasts)
        blocks.append(ResidualBlock(name, module, lasts, shortcut, activates))
    return blocks
