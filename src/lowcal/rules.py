"""Rules: how a local layer learns from its input and output (Sec. 2.1, Eqs. 1 to 4)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowcal.errors import LowcalError
from lowcal.layers import LAYER_TYPES
from lowcal.method_settings import HebbianSettings
from lowcal.products import has_plain_forward, inner_product
from lowcal.settings import Limits, Settings
from lowcal.strided import is_unsafe_unpadded, slice_positions

_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@runtime_checkable
class Rule(Protocol):
    """How a local layer learns in a training step: `Hebbian`, `Frozen`, `Refresh`, or your own rule.

    A rule may also have an attribute ``decay_from``. If it is "switch", `step_size` is called for each layer with the
    number of epochs since that layer became local, and `apply` gets one step per weight.
    """

    @property
    def collects(self) -> bool:
        """Whether `update` is called in the forward pass of local layers; if False, that pass costs nothing extra."""
        ...

    @property
    def opens(self) -> bool:
        """Whether the optimizer trains local layers by their true gradients, once every `every` steps."""
        ...

    @property
    def every(self) -> int:
        """The rule acts once every `every` optimizer steps, beginning with the first step after the first move."""
        ...

    def update(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The layer's update dW from its input a and output z: a new tensor, shaped like `module.weight`.

        It may be in half precision. Updates of several passes and ranks are added in at least single precision.
        """
        ...

    def step_size(self, epoch: int) -> float:
        """The length eta of a local step in the 0-based `epoch`, without its sign.

        Args:
            epoch: counted from the start of the training, or from the layer's switch (``decay_from``).
        """
        ...

    def apply(self, weights: Sequence[Tensor], updates: Sequence[Tensor], step: float | Tensor) -> Tensor:
        """Changes `weights` in place by `updates`, which it may overwrite, and `step`, eta with its sign.

        Args:
            step: a number or a 0-d tensor; with ``decay_from="switch"``, a 1-d tensor with one value per weight.

        Returns:
            The number of weights that did not change, a 0-d integer tensor on the weights' device.
        """
        ...


@dataclass(frozen=True)
class Hebbian(HebbianSettings):
    """Weights move along the correlation of a layer's input and output: W <- W + s eta dW / ||dW|| (Eq. 4).

    Args:
        lr: eta at epoch 0, the length of one step: of the weight's own norm with ``scale="relative"``.
        decay: factor on eta every `decay_every` epochs (published: 0.5 for CIFAR, 0.1 for ImageNet; Sec. 6.1).
        decay_every: epochs between decays.
        scale: "absolute", as published, or "relative" to ||W|| of each layer.
        every: make an update once every `every` optimizer steps; other steps skip its computation too.
        decay_from: count epochs from the "start" of the training, or for each layer from its "switch" to local
            learning, so that eta differs between layers.

    Example:
        >>> Hebbian(lr=0.01, decay=0.5, decay_every=30).step_size(epoch=60)
        0.0025
    """

    collects: ClassVar[bool] = True
    opens: ClassVar[bool] = False

    def update(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        """dW of Eqs. 1 and 3, as `hebbian_update` returns it, but in the type in which it is computed."""
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return _product(*_factors(module, inputs, outputs))

    def step_size(self, epoch: int) -> float:
        """The length eta of a local step in the 0-based `epoch`: lr decay^(epoch // decay_every)."""
        return self.lr * self.decay ** (epoch // self.decay_every)

    def apply(self, weights: Sequence[Tensor], updates: Sequence[Tensor], step: float | Tensor) -> Tensor:
        """Eq. 4: see `apply_updates`."""
        return apply_updates(weights, updates, step, relative=self.scale == "relative")


@dataclass(frozen=True)
class Frozen(Settings):
    """Local layers keep their weights: layer freezing, with which the paper compares (Sec. 3.1)."""

    collects: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    every: ClassVar[int] = 1

    def update(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Never called, since nothing is collected."""
        raise NotImplementedError("a frozen layer makes no update")

    def step_size(self, epoch: int) -> float:
        """Zero."""
        return 0.0

    def apply(self, weights: Sequence[Tensor], updates: Sequence[Tensor], step: float | Tensor) -> Tensor:
        """Leaves the weights as they are."""
        return torch.zeros((), dtype=torch.int64)


@dataclass(frozen=True)
class Refresh(Frozen):
    """Local layers are frozen, but take part in back-propagation once every n steps. Ours, not the paper's.

    Their momentum is kept, and changes their weights in those steps only.

    Args:
        every: n, the number of optimizer steps from one with true gradients to the next.
    """

    every: Annotated[int, Limits(least=2)] = 4  # type: ignore[misc]
    opens: ClassVar[bool] = True


@torch.no_grad()
def hebbian_update(module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """dW = conv_weight(a, z): the weight gradient, with the output instead of its gradient (Eqs. 1, 3).

    Args:
        module: a linear or 1d, 2d or 3d convolution layer, with any stride, padding, padding mode, dilation and groups.
        inputs: a, the layer's input, batched or not.
        outputs: z, the layer's output before normalisation and activation. If the class overrides ``forward``, a and z
            are those of its inner product, from one more pass on `inputs` that does not change the layer.

    Returns:
        dW, shaped like ``module.weight``, summed over batch and positions, in at least single precision, without graph.

    Raises:
        LowcalError: `module` is of another kind, or its own ``forward`` does not compute exactly one product.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> hebbian_update(layer, torch.ones(3, 2), torch.ones(3, 1))
        tensor([[3., 3.]])
    """
    module, inputs, outputs = _factors(module, inputs, outputs)
    return _product(module, inputs, outputs).to(torch.promote_types(module.weight.dtype, torch.float32))


def _factors(module: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[_Layer, Tensor, Tensor]:
    """A layer that computes one plain product, its input and its output."""
    if not isinstance(module, LAYER_TYPES):  # torch 2.10 cannot compile a union here
        raise LowcalError(
            f"hebbian_update: {type(module).__name__} is not a linear or convolution layer; "
            "pass nn.Linear or nn.Conv1d/2d/3d"
        )
    return (module, inputs, outputs) if has_plain_forward(module) else inner_product(module, inputs)


def _product(module: _Layer, inputs: Tensor, outputs: Tensor) -> Tensor:
    """dW in the type in which it is computed."""
    dtype = _product_dtype(outputs)
    a = inputs if inputs.dtype == dtype else inputs.to(dtype)
    z = outputs if outputs.dtype == dtype else outputs.to(dtype)
    with _no_autocast(z.device.type):
        if isinstance(module, nn.Linear):
            return z.reshape(-1, module.out_features).T @ a.reshape(-1, module.in_features)
        return _conv_weight(module, a, z)


def _no_autocast(device: str) -> AbstractContextManager[None]:
    """A context without autocast."""
    if not torch.compiler.is_compiling():
        return torch._C._DisableAutocast()  # a tenth of the time of torch.autocast, but no compiler knows it
    # Not is_autocast_available, which breaks graphs in torch 2.10. The meta device has no autocast to ask about.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _product_dtype(outputs: Tensor) -> torch.dtype:
    """The type of the product: half precision overflows in sums over the positions of a batch."""
    if outputs.dtype != torch.float16:
        return outputs.dtype
    # Not torch.cuda.is_bf16_supported, at which a compiled graph would break.
    is_old = outputs.device.type == "cuda" and torch.cuda.get_device_properties(outputs.device).major < 8
    return torch.float32 if is_old else torch.bfloat16


def _conv_weight(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, z: Tensor) -> Tensor:
    stride, padding = module.stride, module.padding
    if a.dim() == len(stride) + 1:  # unbatched
        a, z = a.unsqueeze(0), z.unsqueeze(0)
    if module.padding_mode != "zeros" or isinstance(padding, str):
        a, padding = _padded(module, a)
    if is_unsafe_unpadded(module) and not any(padding):
        a, stride = slice_positions(a, stride), (1, 1)
    weight = module.weight
    if weight.dtype != a.dtype:  # CUDA wants one type; the product reads only the shape and the memory format
        weight = torch.empty_like(weight, dtype=a.dtype)
    no_padding = (0,) * len(stride)  # of the output
    mask = (False, True, False)
    return torch.ops.aten.convolution_backward(
        z, a, weight, None, stride, padding, module.dilation, False, no_padding, module.groups, mask
    )[1]


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that the product cannot do, and the padding that it can."""
    if isinstance(module.padding, str):
        sizes = zip(module.dilation, module.kernel_size, strict=True)
        total = [d * (k - 1) if module.padding == "same" else 0 for d, k in sizes]
        before, after = tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
    else:
        before = after = module.padding
    if before == after and (module.padding_mode == "zeros" or not any(before)):
        return a, before
    pads = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(a, pads, mode), (0,) * len(before)


@torch.no_grad()
def apply_updates(
    weights: Sequence[Tensor], updates: Sequence[Tensor], step: float | Tensor, *, relative: bool = False
) -> Tensor:
    """W <- W + step * dW / ||dW|| for each layer, in place and without reading from the device (Eq. 4).

    On a GPU with Triton two launches serve up to 64 layers (`lowcal.fused`).

    Args:
        weights: the layers' weights.
        updates: their dW in any floating type, which may be overwritten. Norms and steps are in at least single
            precision.
        step: eta with its sign: a number, a 0-d tensor on the device, or a 1-d tensor with one value per layer.
        relative: whether the step is also multiplied by ||W||.

    Returns:
        How many weights did not change because their ||dW|| is zero or not finite: a 0-d integer tensor.
    """
    skipped = []
    for (device, *_, is_fused), members in _groups(weights, updates).items():
        own = step
        if isinstance(step, Tensor) and step.dim() and len(members) < len(weights):
            own = torch.stack([step[index] for index in members])
        apply = _kernels(device).apply_updates if is_fused else _apply_by_operators
        count = apply([weights[index] for index in members], [updates[index] for index in members], own, relative)
        skipped.append(count.to(weights[0].device))
    return sum(skipped[1:], skipped[0])


def _groups(
    weights: Sequence[Tensor], updates: Sequence[Tensor]
) -> dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[int]]:
    """The layers by device, types of weight and update, and whether the kernels take them."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[int]] = {}
    kernels = {device: _kernels(device) for device in {weight.device for weight in weights}}
    for index, (weight, update) in enumerate(zip(weights, updates, strict=True)):
        own = kernels[weight.device]
        is_fused = own is not None and own.takes(weight, update)
        groups.setdefault((weight.device, weight.dtype, update.dtype, is_fused), []).append(index)
    return groups


@cache
def _kernels(device: torch.device) -> Any:
    """The module `lowcal.fused`, or None where its kernels cannot run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from lowcal import fused

        fused.check(device)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # Triton needs a C compiler and a driver that fits
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"local updates are slower, since Triton does not run on {device}: {reason}", stacklevel=2)
        return None
    return fused


def _apply_by_operators(weights: list[Tensor], updates: list[Tensor], step: float | Tensor, relative: bool) -> Tensor:
    """`apply_updates` for one device and one pair of types."""
    dtype = torch.promote_types(updates[0].dtype, torch.promote_types(weights[0].dtype, torch.float32))
    if updates[0].dtype != dtype:
        updates = [update.to(dtype) for update in updates]
    if isinstance(step, Tensor) and step.dim():
        step = step.to(updates[0].device, dtype)
    norms = torch.stack(torch._foreach_norm(updates))
    usable = norms.isfinite() & (norms > 0)
    factors = norms.reciprocal()
    if relative:
        factors *= torch.stack(torch._foreach_norm(weights)).to(dtype)
    factors = torch.where(usable, step * factors, 0.0)  # rounded alike for a number and a tensor
    torch._foreach_mul_(updates, list(factors.unbind()))
    for update in updates:
        update.nan_to_num_(0.0, 0.0, 0.0)  # what a factor of 0 leaves of an infinite update
    torch._foreach_add_(weights, updates)
    return (~usable).sum()
