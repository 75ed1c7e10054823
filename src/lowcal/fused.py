"""Eq. 4 for all layers in two Triton kernels; import this module only where Triton is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PARTS = 64  # programs per layer at most, a power of two
BLOCK = 4096  # elements that a program reads at a time
LAYERS = 64  # per launch, at most
LEAST_LAYERS = 16  # that the kernels are compiled for, a power of two
WARPS = 8  # per program


def takes(weight: Tensor, update: Tensor) -> bool:
    """Whether the kernels take this pair: types of at most single precision, a weight without gaps in memory."""
    return weight.dtype in DTYPES and update.dtype in DTYPES and _is_dense(weight)


def check(device: torch.device) -> None:
    """Runs the kernels on one weight, so that what is missing, such as a C compiler, shows before a weight changes."""
    weight, update = torch.ones(2, 16, dtype=torch.float32, device=device)
    apply_updates([weight], [update], 1.0)


def apply_updates(
    weights: Sequence[Tensor], updates: Sequence[Tensor], step: float | Tensor, relative: bool = False
) -> Tensor:
    """`lowcal.rules.apply_updates` for pairs of one device and one pair of types that `takes` accepts.

    Two launches serve up to `LAYERS` layers. Where the tensors are is an argument of the kernels, so nothing is copied
    from the host. A CUDA graph records the arguments, and its tensors keep their addresses.
    """
    weight, device = weights[0], weights[0].device
    updates = [_in_layout(update, like) for update, like in zip(updates, weights, strict=True)]
    eta, steps = (0.0, step.to(device)) if isinstance(step, Tensor) else (float(step), None)
    skipped = torch.empty(-(-len(weights) // LAYERS), dtype=torch.int64, device=device)
    with torch.cuda.device_of(weight):
        for group, first in enumerate(range(0, len(weights), LAYERS)):
            own = slice(first, first + LAYERS)
            given = steps[own] if steps is not None and steps.dim() else steps
            _launch(weights[own], updates[own], eta, given, skipped[group:], relative)
    torch.autograd.graph.increment_version(weights)
    return skipped[0] if len(skipped) == 1 else skipped.sum()


def _launch(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    eta: float,
    steps: Tensor | None,
    skipped: Tensor,
    relative: bool,
) -> None:
    """Launches both kernels for at most `LAYERS` layers; `skipped[0]` is how many of them were left as they are."""
    count = len(weights)
    columns = [
        [tensor.data_ptr() for tensor in weights],
        [tensor.data_ptr() for tensor in updates],
        [weight.numel() for weight in weights],
    ]
    is_aligned = not any(number % 16 for column in columns for number in column)
    parts = min(PARTS, max(1, -(-max(columns[2]) // BLOCK)))
    # Triton compiles a kernel again for another number of arguments, for one that fits 32 bits, and for one that is no
    # multiple of 16. So their number is a power of two, the first one repeated, and sizes are multiplied.
    columns[2] = [16 * size for size in columns[2]]
    layers = max(LEAST_LAYERS, 1 << (count - 1).bit_length())
    weight_at, update_at, sizes = (tuple(column + column[:1] * (layers - count)) for column in columns)
    partials = torch.empty(1 + relative, count, PARTS, dtype=torch.float32, device=skipped.device)
    options: dict[str, Any] = {
        "WEIGHT": DTYPES[weights[0].dtype],
        "UPDATE": DTYPES[updates[0].dtype],
        "RELATIVE": relative,
        "ALIGNED": is_aligned,
        "PARTS": PARTS,
        "BLOCK": BLOCK,
        "LAYERS": layers,
        "num_warps": WARPS,
    }
    tensors = weight_at, update_at, sizes, partials, skipped
    _sum_squares[parts, count](*tensors, **options)
    _add[parts, count](*tensors, eta, steps, EACH=steps is not None and steps.dim() > 0, **options)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return True  # the common cases, soon known
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _in_layout(update: Tensor, weight: Tensor) -> Tensor:
    """The update with its elements in the order of the weight's, which is dense; copied only if it has to be."""
    ours, theirs = update.stride(), weight.stride()
    if ours == theirs or all(a == b or size == 1 for a, b, size in zip(ours, theirs, weight.shape, strict=True)):
        return update
    return torch.empty_like(weight, dtype=update.dtype).copy_(update)


@triton.jit
def _own(values: tl.tuple, LAYERS: tl.constexpr) -> tl.tensor:
    """The value for the layer of this program, as int64."""
    value = values[0]
    for index in tl.static_range(1, LAYERS):
        value = tl.where(tl.program_id(1) == index, values[index], value)
    return value.to(tl.int64)


@triton.jit
def _size(sizes: tl.tuple, ALIGNED: tl.constexpr, LAYERS: tl.constexpr) -> tl.tensor:
    """The number of elements of the layer of this program."""
    size = _own(sizes, LAYERS) // 16
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def _pointer(addresses: tl.tuple, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LAYERS: tl.constexpr) -> tl.tensor:
    """The pointer for the layer of this program. The hint has to follow the cast, or loads are of one element each."""
    pointer = _own(addresses, LAYERS).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _sum_squares(
    weight_at: tl.tuple, update_at: tl.tuple, sizes: tl.tuple, partials: tl.tensor, skipped: tl.tensor,
    WEIGHT: tl.constexpr, UPDATE: tl.constexpr, RELATIVE: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, LAYERS: tl.constexpr,
) -> None:  # fmt: skip
    """The sum of squares of each part of each layer: of dW, and with RELATIVE of W. No atomics, so runs are alike."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    layer, layers = tl.program_id(1), tl.num_programs(1)
    if part + layer == 0:
        tl.store(skipped, 0)
    size = _size(sizes, ALIGNED, LAYERS)
    update = _pointer(update_at, UPDATE, ALIGNED, LAYERS)
    weight = _pointer(weight_at, WEIGHT, ALIGNED, LAYERS)
    lanes = tl.arange(0, BLOCK)
    updates = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in range(part * BLOCK, size, parts * BLOCK):
        index = start + lanes
        value = tl.load(update + index, mask=index < size, other=0.0).to(tl.float32)
        updates += value * value
        if RELATIVE:
            value = tl.load(weight + index, mask=index < size, other=0.0).to(tl.float32)
            weights += value * value
    tl.store(partials + layer * PARTS + part, tl.sum(updates))
    if RELATIVE:
        tl.store(partials + (layers + layer) * PARTS + part, tl.sum(weights))


@triton.jit
def _add(
    weight_at: tl.tuple, update_at: tl.tuple, sizes: tl.tuple, partials: tl.tensor, skipped: tl.tensor, eta: tl.tensor,
    steps: tl.tensor, WEIGHT: tl.constexpr, UPDATE: tl.constexpr, RELATIVE: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, LAYERS: tl.constexpr, EACH: tl.constexpr,
) -> None:  # fmt: skip
    """W += step * dW / ||dW||. The step is `steps[layer]` with EACH, else `steps[0]`, or `eta` if `steps` is None."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    layer, layers = tl.program_id(1), tl.num_programs(1)
    each = tl.arange(0, PARTS)
    norm = tl.sqrt_rn(tl.sum(tl.load(partials + layer * PARTS + each, mask=each < parts, other=0.0)))
    factor = 1.0 / norm
    if RELATIVE:
        squares = tl.load(partials + (layers + layer) * PARTS + each, mask=each < parts, other=0.0)
        factor *= tl.sqrt_rn(tl.sum(squares))
    if steps is None:
        factor *= eta
    elif EACH:
        factor *= tl.load(steps + layer).to(tl.float32)
    else:
        factor *= tl.load(steps).to(tl.float32)
    usable = (norm > 0) & (norm < float("inf"))
    if part == 0:
        tl.atomic_add(skipped, (usable == 0).to(tl.int64))
    if usable & (tl.abs(factor) < float("inf")):
        size = _size(sizes, ALIGNED, LAYERS)
        update = _pointer(update_at, UPDATE, ALIGNED, LAYERS)
        weight = _pointer(weight_at, WEIGHT, ALIGNED, LAYERS)
        lanes = tl.arange(0, BLOCK)
        for start in range(part * BLOCK, size, parts * BLOCK):
            index = start + lanes
            step = tl.load(update + index, mask=index < size).to(tl.float32) * factor
            before = tl.load(weight + index, mask=index < size).to(tl.float32)
            tl.store(weight + index, (before + step).to(WEIGHT), mask=index < size)
