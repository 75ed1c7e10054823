"""The product of input and weight in a layer's forward pass, also if the class overrides ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowcal.errors import LowcalError
from lowcal.layers import LAYER_TYPES, unchanged, weight_of

_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OWN_METHODS = {
    kind: [(name, getattr(kind, name)) for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    for kind in LAYER_TYPES
}


class Product(NamedTuple):
    """The arguments of a call of `F.linear`, `F.conv1d`, `F.conv2d` or `F.conv3d`."""

    inputs: Tensor
    weight: Tensor
    options: dict[str, Any]  # those of stride, padding, dilation and groups that were given


def product_of(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Product | None:
    """The product that a call of `function` computes; None if it computes none."""
    if function not in _PRODUCTS:
        return None
    options = {**dict(zip(_ARGUMENTS, args, strict=False)), **keywords}
    inputs, weight = options.pop("input"), options.pop("weight")
    options.pop("bias", None)
    return Product(inputs, weight, options)


def at_least_single(tensor: Tensor) -> Tensor:
    """`tensor` in single precision if it is in half precision, else itself."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def has_plain_forward(layer: nn.Module) -> bool:
    """Whether calling `layer` computes what its torch class does, so that its input and output are the product's."""
    if "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__:
        return False
    for kind, methods in _OWN_METHODS.items():
        if isinstance(layer, kind):
            for name, method in methods:
                if getattr(type(layer), name) is not method:
                    return False
    return True


class ProductCapture(TorchFunctionMode):
    """Observes the inner product of a layer that overrides ``forward``; enter it before that forward, and exit after.

    Args:
        layer: a linear or convolution layer whose class overrides ``forward``.
        found: called at once with a plain layer, a and z. The plain layer is of the torch class, with the same weight
            and the stride, padding, dilation and groups that the forward passed to the product. z includes the bias
            passed to the product, and nothing that follows.
    """

    def __init__(self, layer: nn.Module, found: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._plain, self._found = _plain(layer), found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        product = product_of(func, args, kwargs)
        if product is not None and product.weight is weight_of(self._plain):
            _set_options(self._plain, product.options)
            self._found(self._plain, product.inputs, outputs)
        return outputs


def inner_product(layer: nn.Module, inputs: Tensor) -> tuple[Any, Tensor, Tensor]:
    """What `ProductCapture` finds in a pass of `layer` on `inputs`; buffers and random generators stay as they were.

    Raises:
        LowcalError: the class's forward computes more or fewer than one product with the layer's weight.
    """
    found: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(plain: nn.Module, a: Tensor, z: Tensor) -> None:
        found.append((plain, a.clone(), z.clone()))  # what follows in the forward may overwrite them

    with unchanged(layer), torch.no_grad(), ProductCapture(layer, keep):
        layer.forward(inputs)  # not a call, which would run the layer's hooks again
    if len(found) != 1:
        raise LowcalError(
            f"{type(layer).__name__} has a forward of its own, in which its weight is a factor of {len(found)} "
            "products of a linear layer or convolution instead of one; use a layer of torch.nn"
        )
    return found[0]


def _plain(layer: nn.Module) -> nn.Module:
    kind = next(kind for kind in LAYER_TYPES if isinstance(layer, kind))
    plain: nn.Module = object.__new__(kind)
    nn.Module.__init__(plain)
    plain._parameters = layer._parameters  # the same dictionary: a weight that is replaced is seen
    for name in ("in_features", "out_features", "in_channels", "out_channels", "kernel_size"):
        if hasattr(layer, name):
            setattr(plain, name, getattr(layer, name))
    return plain


def _set_options(plain: nn.Module, options: dict[str, Any]) -> None:
    if isinstance(plain, nn.Linear):
        return
    dimensions = plain.weight.dim() - 2  # type: ignore[operator]
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = options.get(name, default)
        setattr(plain, name, (value,) * dimensions if isinstance(value, int) else value)
    plain.groups, plain.padding_mode = options.get("groups", 1), "zeros"  # type: ignore[assignment]
