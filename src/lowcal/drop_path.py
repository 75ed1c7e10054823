"""Drop path that computes only the samples it keeps.

Drop path (stochastic depth per sample) multiplies the branch of a residual sum, x + drop_path(branch(x)), by 0 or
1 / keep for each sample. Here the branch gets the kept samples alone, and its output is added to theirs, as DINOv2 does
(Oquab et al. 2023, arXiv 2304.07193, section 5).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError
from lowcal.hooks import Hook

# The residual sums of a block: the module in which the branch begins, and its drop path. By the name of the forward
# method, so that a subclass with another one does not count.
_SUMS = {
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": [("conv_dw", "drop_path")],
    "timm.models._efficientnet_blocks.EdgeResidual": [("conv_exp", "drop_path")],
    "timm.models._efficientnet_blocks.InvertedResidual": [("conv_pw", "drop_path")],
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": [("dw_start", "drop_path")],
    "timm.models.beit.Block": [("norm1", "drop_path1"), ("norm2", "drop_path2")],
    "timm.models.convnext.ConvNeXtBlock": [("conv_dw", "drop_path")],
    "timm.models.mlp_mixer.MixerBlock": [("norm1", "drop_path"), ("norm2", "drop_path")],
    "timm.models.regnet.Bottleneck": [("conv1", "drop_path")],
    "timm.models.resnet.BasicBlock": [("conv1", "drop_path")],
    "timm.models.resnet.Bottleneck": [("conv1", "drop_path")],
    "timm.models.swin_transformer.SwinTransformerBlock": [("norm1", "drop_path1"), ("norm2", "drop_path2")],
    "timm.models.vision_transformer.Block": [("norm1", "drop_path1"), ("norm2", "drop_path2")],
    "timm.models.vision_transformer.ResPostBlock": [("attn", "drop_path1"), ("mlp", "drop_path2")],
    "torchvision.models.convnext.CNBlock": [("block", "stochastic_depth")],
    "torchvision.models.efficientnet.FusedMBConv": [("block", "stochastic_depth")],
    "torchvision.models.efficientnet.MBConv": [("block", "stochastic_depth")],
    "torchvision.models.swin_transformer.SwinTransformerBlock": [
        ("norm1", "stochastic_depth"),
        ("norm2", "stochastic_depth"),
    ],
    "torchvision.models.swin_transformer.SwinTransformerBlockV2": [
        ("attn", "stochastic_depth"),
        ("mlp", "stochastic_depth"),
    ],
}
_SKIPS = ("use_res_connect", "has_skip")  # False in a block that has a drop path and no residual sum


def save_drop_path(model: nn.Module, *, allow_batch_norm: bool = False) -> SavedDropPath:
    """Lets the drop path of `model` compute only the samples it keeps, in training mode.

    The distribution is the model's own: each sample is kept or dropped independently, at the present rate of its
    module. The draws come from torch's generator of the CPU, on every device, so that no step waits for the device. If
    a branch keeps no sample, it computes one, whose output is not used. Evaluation, a rate of 0, compiled passes and
    copies of the model are as before.

    timm's ViT, BEiT, Swin, ConvNeXt, EfficientNet, MobileNetV3, ResNet, RegNet and MLP-Mixer are known, and
    torchvision's ConvNeXt, Swin and EfficientNet.

    Args:
        model: a network with timm's `DropPath` or torchvision's `StochasticDepth` modules.
        allow_batch_norm: accept batch normalisation in the branches. Its statistics then come from the kept samples
            alone, and from at least two.

    Returns:
        A handle, which restores the model's own drop path by `detach()` or at the end of a ``with`` statement.

    Raises:
        LowcalError: the model has no drop path, has it in blocks of an unknown class or next to batch normalisation, is
            compiled, or saves its drop path already. Nothing is changed then.

    Example:
        >>> from torchvision.models import convnext_tiny
        >>> model = convnext_tiny(stochastic_depth_prob=0.3)
        >>> saved = save_drop_path(model)
        >>> len(saved.blocks)
        18
    """
    _check_model(model)
    branches: list[_Branch] = []
    found = False
    for name, block in model.named_modules():
        has_drop_path = any(_is_drop_path(child) for child in block.children())
        found = found or has_drop_path
        if not has_drop_path or not all(getattr(block, attribute, True) for attribute in _SKIPS):
            continue
        forward = type(block).forward
        sums = _SUMS.get(f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward"))
        if sums is None:
            raise LowcalError(
                f"save_drop_path: it does not know the block '{name}', a {type(block).__module__}."
                f"{type(block).__name__}; train this network with its own drop path"
            )
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in block.modules())
        if has_batch_norm and not allow_batch_norm:
            raise LowcalError(
                f"save_drop_path: the block '{name}' has batch normalisation, whose statistics would come from the "
                "kept samples alone; pass allow_batch_norm=True to accept that, or use layer normalisation"
            )
        branches += [
            _Branch(name, block, block.get_submodule(first), drop, least=2 if has_batch_norm else 1)
            for first, last in sums
            if _is_drop_path(drop := getattr(block, last))
        ]
    if not found:
        raise LowcalError(
            f"save_drop_path: {type(model).__name__} has no drop path (modules DropPath or StochasticDepth); build it "
            "with a rate, such as drop_path_rate=0.3 in timm or stochastic_depth_prob=0.3 in torchvision"
        )
    return SavedDropPath(branches)


class SavedDropPath:
    """What `save_drop_path` returns.

    Attributes:
        blocks: the names of the blocks whose branches get the kept samples alone.
    """

    def __init__(self, branches: list[_Branch]) -> None:
        self.blocks = tuple(dict.fromkeys(branch.name for branch in branches))
        self._handles = [handle for branch in branches for handle in branch.attach()]

    def detach(self) -> None:
        """Restores the model's own drop path."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> SavedDropPath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def check_computes_all(model: nn.Module, step: str) -> None:
    """Checks that the shapes in `model` are the same in each step.

    Raises:
        LowcalError: the model is under `save_drop_path`.
    """
    if _is_saved(model):
        raise LowcalError(
            f"the step '{step}' cannot run a network under save_drop_path, whose branches get another number of "
            "samples in each step; use the step 'eager', or call detach() of the handle"
        )


class _Branch:
    """One branch of a block: selects its samples where it begins, and adds its output to theirs where it ends."""

    def __init__(self, name: str, block: nn.Module, first: nn.Module, drop: nn.Module, *, least: int) -> None:
        self.name = name
        self._block, self._first, self._drop = block, first, drop
        self._least = least
        self._selection: tuple[Tensor, int, int] | None = None  # samples computed, how many are kept, how many exist

    def attach(self) -> list[RemovableHandle]:
        """Registers the hooks."""
        return [
            self._block.register_forward_pre_hook(Hook(_begin, self), with_kwargs=True),
            self._first.register_forward_pre_hook(_Selecting(_select, self)),
            self._drop.register_forward_pre_hook(Hook(_pause, self)),
            self._drop.register_forward_hook(Hook(_scatter, self)),
            self._block.register_forward_hook(Hook(_end, self)),
        ]

    def begin(self, others: list[Any]) -> None:
        """Checks the arguments of the block besides its input."""
        self._selection = None
        if self._drop.training and any(isinstance(other, Tensor) for other in others):
            raise LowcalError(
                f"save_drop_path: the block '{self.name}' got a second tensor, such as a mask, of which it cannot "
                "select the kept samples; call detach() of the handle"
            )

    def select(self, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The input of the branch, (N, ...), without the dropped samples; at least `least` remain."""
        x = inputs[0]
        rate, is_shared, _ = _properties(self._drop)
        # In a captured graph this draw would be the same in each replay; the model's own draws on the device.
        if not self._drop.training or rate == 0 or _is_captured(x):
            return None
        count = len(x)
        is_kept = (torch.rand(1 if is_shared else count, device="cpu") >= rate).expand(count)
        kept = int(is_kept.sum())
        order = is_kept.byte().argsort(descending=True, stable=True)  # the kept samples come first
        chosen = order[: max(kept, min(self._least, count))].to(x.device, non_blocking=True)
        self._selection = chosen, kept, count
        if len(chosen) == count and kept == count:
            return None
        return (_selected(x, chosen), *inputs[1:])

    def pause(self) -> None:
        """Makes the model's own drop path, which runs next, the identity."""
        if self._selection is not None:
            self._drop.training = False

    def scatter(self, y: Tensor) -> Tensor | None:
        """The branch's output, scaled, at the kept samples, (N, ...), and 0 at the others."""
        if self._selection is None:
            return None
        self._drop.training = True
        (chosen, kept, count), self._selection = self._selection, None
        rate, _, is_scaled = _properties(self._drop)
        scale = 1 / (1 - rate) if is_scaled and rate < 1 else 1.0
        if kept == count:
            return y * scale
        kind = torch.channels_last if _is_channels_last(y) else torch.contiguous_format
        # Not a view: blocks add to it in place, and autograd would copy the gradient of the whole.
        whole = torch.empty((count, *y.shape[1:]), dtype=y.dtype, device=y.device, memory_format=kind).zero_()
        return whole.index_add_(0, chosen[:kept], y[:kept], alpha=scale)

    def end(self) -> None:
        """Checks that the block's drop path has run."""
        if self._selection is not None:
            self._selection = None
            raise LowcalError(f"save_drop_path: the block '{self.name}' did not run its drop path; call detach()")


class _Selecting(Hook):
    """The hook by which a network under `save_drop_path` is recognised; its copies have a plain no-op."""


def _begin(branch: _Branch, block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    branch.begin([*inputs[1:], *keywords.values()])


def _select(branch: _Branch, first: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return branch.select(inputs)


def _pause(branch: _Branch, drop: nn.Module, inputs: tuple[Any, ...]) -> None:
    branch.pause()


def _scatter(branch: _Branch, drop: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    return branch.scatter(output)


def _end(branch: _Branch, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    branch.end()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise LowcalError(f"save_drop_path: the model is {type(model).__name__}; give an nn.Module")
    if isinstance(model, nn.DataParallel):
        raise LowcalError("save_drop_path: the model is wrapped in DataParallel; use DistributedDataParallel")
    if "_orig_mod" in model._modules or any(m._compiled_call_impl is not None for m in model.modules()):
        raise LowcalError("save_drop_path: the model is compiled, for one number of samples; give one that is not")
    if _is_saved(model):
        raise LowcalError("save_drop_path: the model saves its drop path already; call detach() of that handle first")


def _is_saved(model: nn.Module) -> bool:
    return any(isinstance(hook, _Selecting) for m in model.modules() for hook in m._forward_pre_hooks.values())


def _is_drop_path(module: nn.Module) -> bool:
    kind = type(module).__name__
    return (kind == "DropPath" and hasattr(module, "drop_prob")) or (
        kind == "StochasticDepth" and hasattr(module, "p") and hasattr(module, "mode")
    )


def _properties(drop: Any) -> tuple[float, bool, bool]:
    """The rate, whether all samples share one draw, and whether kept samples are scaled by 1 / (1 - rate)."""
    if type(drop).__name__ == "DropPath":
        return float(drop.drop_prob or 0), False, getattr(drop, "scale_by_keep", True)
    return float(drop.p), drop.mode == "batch", True


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _selected(x: Tensor, chosen: Tensor) -> Tensor:
    """`x` at the samples `chosen`, in its memory format, which `index_select` alone does not keep."""
    if _is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(0, chosen).permute(0, 3, 1, 2)
    return x.index_select(0, chosen)
