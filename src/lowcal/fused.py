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

    The kernels read from a table in device memory where the tensors are. It is cleared, which is one launch. Its values
    are arguments of the operator that fills it, one launch for each 32 layers, so nothing is copied from the host. A
    CUDA graph records these arguments. Its tensors keep their addresses, and so each replay fills the table with the
    same, right values.
    """
    weight, device = weights[0], weights[0].device
    updates = [_in_layout(update, like) for update, like in zip(updates, weights, strict=True)]
    pointers = [tensor.data_ptr() for tensor in (*weights, *updates)]
    sizes = [tensor.numel() for tensor in weights]
    table = torch.zeros(3 * len(weights) + 1, dtype=torch.int64, device=device)  # the last value counts skipped layers
    torch._foreach_add_(table.unbind()[:-1], pointers + sizes)
    partials = torch.empty(1 + relative, len(weights), PARTS, dtype=torch.float32, device=device)
    parts = min(PARTS, max(1, -(-max(sizes) // BLOCK)))
    eta, steps = (0.0, step.to(device)) if isinstance(step, Tensor) else (float(step), None)
    options: dict[str, Any] = {
        "WEIGHT": DTYPES[weight.dtype],
        "UPDATE": DTYPES[updates[0].dtype],
        "RELATIVE": relative,
        "ALIGNED": all(number % 16 == 0 for number in pointers + sizes),
        "PARTS": PARTS,
        "BLOCK": BLOCK,
        "num_warps": 8,
    }
    with torch.cuda.device_of(weight):
        _sum_squares[parts, len(weights)](table, partials, **options)
        _add[parts, len(weights)](table, partials, eta, steps, EACH=steps is not None and steps.dim() > 0, **options)
    torch.autograd.graph.increment_version(weights)
    return table[-1]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order."""
    if tensor.is_contiguous():
        return True
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
def _row(table: tl.tensor, row: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The value in a row of the table for the layer of this program: addresses of weight and update, or their size."""
    value = tl.load(table + row * tl.num_programs(1) + tl.program_id(1))
    return tl.multiple_of(value, 16) if ALIGNED else value


@triton.jit
def _pointer(table: tl.tensor, row: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The same as a pointer. The hint has to follow the cast, or the loads are of one element each."""
    pointer = _row(table, row, False).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _sum_squares(
    table: tl.tensor, partials: tl.tensor, WEIGHT: tl.constexpr, UPDATE: tl.constexpr, RELATIVE: tl.constexpr,
    ALIGNED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The sum of squares of each part of each layer: of dW, and with RELATIVE of W. No atomics, so runs are alike."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    layer, layers = tl.program_id(1), tl.num_programs(1)
    size = _row(table, 2, ALIGNED)
    update = _pointer(table, 1, UPDATE, ALIGNED)
    weight = _pointer(table, 0, WEIGHT, ALIGNED)
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
    table: tl.tensor, partials: tl.tensor, eta: tl.tensor, steps: tl.tensor, WEIGHT: tl.constexpr, UPDATE: tl.constexpr,
    RELATIVE: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
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
        tl.atomic_add(table + 3 * layers, (usable == 0).to(tl.int64))
    if usable & (tl.abs(factor) < float("inf")):
        size = _row(table, 2, ALIGNED)
        update = _pointer(table, 1, UPDATE, ALIGNED)
        weight = _pointer(table, 0, WEIGHT, ALIGNED)
        lanes = tl.arange(0, BLOCK)
        for start in range(part * BLOCK, size, parts * BLOCK):
            index = start + lanes
            step = tl.load(update + index, mask=index < size).to(tl.float32) * factor
            before = tl.load(weight + index, mask=index < size).to(tl.float32)
            tl.store(weight + index, (before + step).to(WEIGHT), mask=index < size)
