"""On the CPU, refuses what a GPU refuses: operators whose tensors differ in type or device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that are not pointwise and yet take tensors of several floating types on a GPU.
_MIXED = {
    "_to_copy", "copy_", "cat", "embedding", "native_batch_norm", "native_batch_norm_backward", "native_layer_norm",
    "native_layer_norm_backward", "_native_batch_norm_legit", "_batch_norm_with_update", "batch_norm_backward",
    "_amp_foreach_non_finite_check_and_unscale_",
}  # fmt: skip


class Strict(TorchDispatchMode):
    """Raises TypeError for an operator whose tensors would not go together on a GPU.

    The CPU multiplies a bf16 input by a float32 weight; CUDA does not. Pointwise operators and `_foreach` ones promote
    types on both. A 0-d tensor may have another type, and may lie on the CPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        promotes = torch.Tag.pointwise in func.tags or name.startswith("_foreach") or name in _MIXED
        if len(dtypes) > 1 and not promotes:
            raise TypeError(f"{name}: types {sorted(map(str, dtypes))}")
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and name not in ("copy_", "_to_copy"):
            raise TypeError(f"{name}: devices {sorted(devices)}")
        return func(*args, **kwargs)
