"""A workaround for strided 1x1 convolutions on a CPU, whose weight gradient can write outside its memory.

With channels last and few input channels, oneDNN's weight gradient of such a layer in float32 uses a workspace that is
too small: the process crashes, hangs, or can give wrong numbers (torch 2.10 to 2.15;
https://github.com/uxlfoundation/oneDNN/issues/6035). The layer reads one position per stride. So it equals a
convolution of stride 1 over those positions, and oneDNN computes that correctly.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

SAFE_CHANNELS = 16  # oneDNN's block of channels with AVX-512; with AVX2 it is 8


def is_unsafe(module: nn.Module) -> bool:
    """Whether `module` is such a layer: its weight gradient may be wrong on a CPU with channels last."""
    return is_unsafe_unpadded(module) and module.padding in ((0, 0), "valid")


def is_unsafe_unpadded(module: nn.Module) -> bool:
    """Whether `module` would be such a layer without padding, for inputs that are already padded."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.groups == 1
        and module.in_channels < SAFE_CHANNELS
    )


def slice_inputs(model: nn.Module) -> list[str]:
    """Gives each such layer of `model` on a CPU a stride of 1, and a hook that selects the positions that it reads.

    The network's outputs and the keys of its `state_dict` stay the same. Call it again after pruning channels.

    Returns:
        The names of the layers that it changed.
    """
    changed = []
    for name, module in model.named_modules():
        if is_unsafe(module) and module.weight.device.type == "cpu":
            module.register_forward_pre_hook(partial(_slice, module.stride))
            module.stride = (1, 1)
            changed.append(name)
    return changed


def slice_positions(inputs: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The positions of `inputs` (..., H, W) that a 1x1 convolution of this stride reads; a view."""
    return inputs[..., :: stride[0], :: stride[1]]


def _slice(stride: tuple[int, ...], module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return slice_positions(inputs[0], stride)
