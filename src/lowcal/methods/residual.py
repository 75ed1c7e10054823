"""The residual blocks of a network: the end of the branch, and the shortcut."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Kind:
    last: str
    shortcut: str | None
    activation: bool


# By the name of the forward method, so that a subclass with another one does not count.
_KINDS = {
    "lowcal.models.BasicBlock.forward": _Kind("norm2", "shortcut", activation=True),
    "torchvision.models.resnet.BasicBlock.forward": _Kind("bn2", "downsample", activation=True),
    "torchvision.models.resnet.Bottleneck.forward": _Kind("bn3", "downsample", activation=True),
    "torchvision.models.mobilenetv2.InvertedResidual.forward": _Kind("conv", None, activation=False),
}


@dataclass(frozen=True)
class ResidualBlock:
    """A module that computes activation(branch(x) + shortcut(x)).

    Attributes:
        name: of the block in its network.
        module: the block.
        last: the branch's last module; its output is added to the shortcut's.
        shortcut_name: the shortcut's name in the block; None if it is the identity.
        activation: whether a ReLU follows the sum.
    """

    name: str
    module: nn.Module
    last: nn.Module
    shortcut_name: str | None
    activation: bool

    def without_branch(self, x: Tensor) -> Tensor:
        """What the block computes with the branch removed, (N, C_out, H_out, W_out)."""
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
    """The residual blocks of `model`, ours and torchvision's, in the order of their registration."""
    blocks = []
    for name, module in model.named_modules():
        forward = type(module).forward
        kind = _KINDS.get(f"{forward.__module__}.{forward.__qualname__}")
        if kind is None or not getattr(module, "use_res_connect", True):  # which MobileNetV2's blocks have
            continue
        shortcut = kind.shortcut
        if shortcut is not None and getattr(module, shortcut) is None:
            shortcut = None
        blocks.append(ResidualBlock(name, module, module.get_submodule(kind.last), shortcut, kind.activation))
    return blocks
