"""What training costs: FLOPs and memory of a step from a dry run that computes nothing, and of a run's epochs."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lowcal.cache import Suffix
from lowcal.data import Shard
from lowcal.methods import Method
from lowcal.program import record
from lowcal.steps.step import PRECISIONS, EagerStep, StepOptions, autocast


@dataclass(frozen=True)
class Cost:
    """What one training step costs.

    Attributes:
        flops: floating-point operations in products, as `flop_counter` counts them, on average over many steps.
        peak_bytes: most bytes that tensors hold at a time: weights, gradients, optimizer state, images, activations.
        cached_flops: floating-point operations of the layers that are computed once for each image, for a mini-batch.
    """

    flops: int
    peak_bytes: int
    cached_flops: int = 0


def dry_cost(method: Method, shape: Sequence[int], *, precision: str = "float32", cached: bool = False) -> Cost:
    """The cost of one training step of `method` at its present boundary, from a copy of its network without data.

    Args:
        method: attached to a network; neither changes.
        shape: of the mini-batch's images, (N, C, H, W).
        precision: "float32", "bf16" or "fp16".
        cached: whether the layers before the boundary are computed once for each image.
    """
    # Autocast ignores meta tensors but converts fake ones, which are slower. Only what is made here may be fake: a
    # method still draws real numbers.
    is_mixed = PRECISIONS[precision] is not None
    device = torch.device("cpu" if is_mixed else "meta")
    with torch.random.fork_rng([]), _LiveBytes() as live:
        with FakeTensorMode(allow_non_fake_inputs=True) if is_mixed else nullcontext():
            model, optimizer = _empty_copies(method.model, method.optimizer, device)
            images = torch.empty(*shape, device=device)
            labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
        twin = method.twin(model, optimizer, images)
        model.train()
        _make_state(optimizer)
        network, inputs, cached_flops = model, [images], 0
        if cached and twin.boundary:
            network = suffix = Suffix(model)
            with autocast(torch.device("cpu"), precision):
                program = suffix.programs[len(images)] = record(model, images)
                cached_flops = _count(lambda: inputs.extend(program.prefix({0: inputs.pop()}).values()))
        step = EagerStep(network, (optimizer,), twin, StepOptions(torch.device("cpu"), precision))
        live.peak = live.now
        flops = round(twin.expected_flops(lambda: step(*inputs, labels), _count))
        twin.detach()
        return Cost(flops, live.peak, cached_flops)


def _make_state(optimizer: Optimizer) -> None:
    """Takes an optimizer step without a forward pass, so that the optimizer has all of its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _count(work: Callable[[], Any]) -> int:
    """The FLOPs of `work`."""
    with flop_counter() as counter:
        work()
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, corrected for grouped convolutions.

    torch multiplies the FLOPs of their weight gradients by the number of groups (torch 2.15). For the depthwise layers
    of MobileNetV2 that is most of its count.
    """
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )


def _convolution_backward_flops(
    gradient: Sequence[int],
    inputs: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """The product for the gradient of the input, and that for the weight, each cost as much as the forward pass."""
    positions = inputs if transposed else gradient
    return 2 * math.prod(positions) * math.prod(weight[1:]) * sum(wanted[:2])


def held_bytes(model: nn.Module, optimizer: Optimizer, *, gradients: bool = True) -> int:
    """Bytes that a network and its optimizer hold between steps: weights, gradients, buffers, optimizer state."""
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers(), *tree_leaves([dict(state) for state in optimizer.state.values()])]
    tensors += [parameter.grad for parameter in parameters if gradients]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.device == parameters[0].device
    }
    return sum(storages.values())


def _empty_copies(model: nn.Module, optimizer: Optimizer, device: torch.device) -> tuple[nn.Module, Optimizer]:
    """Copies on `device` with the shapes, strides and types of the originals, but no values."""
    empties: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        empties[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    groups = [
        {**_portable(group), "params": [empties[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    copied = copy.deepcopy(model, dict(empties))
    return copied, type(optimizer)(groups)  # type: ignore[call-arg]


def _portable(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's settings without those that select kernels of a device."""
    return {name: value for name, value in group.items() if name not in ("params", "fused", "foreach")}


def _batch_norm(images: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of native_batch_norm: the output, and each channel's mean and deviation if the batch gives them."""
    is_training = next(value for value in rest if isinstance(value, bool))
    kept = images.shape[1] if is_training else 0
    dtype = torch.float32 if images.dtype in (torch.float16, torch.bfloat16) else images.dtype
    return torch.empty_like(images), images.new_empty(kept, dtype=dtype), images.new_empty(kept, dtype=dtype)


def _batch_norm_backward(
    gradient: Tensor, images: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """The shapes of native_batch_norm_backward: the gradients that its last argument asks for."""
    channels = images.shape[1]
    of_images, of_weight, of_bias = rest[-1]
    dtype = images.dtype if weight is None else weight.dtype
    return (
        torch.empty_like(images) if of_images else None,
        images.new_empty(channels, dtype=dtype) if of_weight else None,
        images.new_empty(channels, dtype=dtype) if of_bias else None,
    )


# Without values torch (2.15) decomposes these into dozens of operations in Python, most of the time of a dry run.
_SHORTCUTS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten._native_batch_norm_legit.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages of all tensors that were created while it is entered and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = _SHORTCUTS.get(func, func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # the object lives as long as the storage does
        if key in self._storages:
            return

        def forget(_: Any) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


class CostMeter:
    """Counts an epoch's FLOPs by dry runs, and its memory by the device if that counts it, else by dry runs too.

    Args:
        method: attached to the network; `reset` must be called when either changes.
        device: the device of the network.
        precision: of its steps.
        world: processes that share each mini-batch.
        cached: whether the layers before the boundary are computed once for each image.
        kept: bytes that the run holds throughout besides the network and its optimizer.
    """

    def __init__(
        self,
        method: Method,
        device: torch.device,
        precision: str,
        world: int = 1,
        *,
        cached: bool = False,
        kept: int = 0,
    ) -> None:
        self._method, self._device, self._precision, self._cached = method, device, precision, cached
        self._largest = Shard(0, world)
        self._kept = kept
        self._costs: dict[tuple[int, ...], Cost] = {}
        # Bytes, in the epochs since `reset`: a step that is replayed on the device allocates only once.
        self._peak = 0
        self._others = 0  # bytes on the device that belong to data sets and to other runs

    def reset(self) -> None:
        """Forgets the cost of steps so far."""
        self._costs.clear()
        self._peak = 0

    def start(self) -> None:
        """Starts to count peak memory."""
        if self._device.type == "cuda":
            gc.collect()  # copies from the warm-up would be counted as another run's, and freed within the epoch
            torch.cuda.reset_peak_memory_stats(self._device)
            own = held_bytes(self._method.model, self._method.optimizer) + self._kept
            self._others = torch.cuda.memory_allocated(self._device) - own

    def held(self) -> int:
        """Bytes that the run holds throughout a step, without gradients and images."""
        return held_bytes(self._method.model, self._method.optimizer, gradients=False) + self._kept

    def peak(self) -> int:
        """Most bytes in a step since `reset`; 0 on a device that does not count them."""
        if self._device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device) - self._others)
        return self._peak

    def count(self, shapes: Mapping[tuple[int, ...], int], peak: int, *, fills: bool = False) -> tuple[int, int]:
        """The FLOPs of steps, and the most bytes that one of them takes on a device.

        Args:
            shapes: how many steps there were for each shape of images, over all processes.
            peak: the bytes if the device counted them, else 0.
            fills: whether these are the first steps at this boundary, which fill the cache.
        """
        costs = [(self._cost(shape), count) for shape, count in shapes.items()]
        flops = sum((cost.flops + fills * cost.cached_flops) * count for cost, count in costs)
        largest = max(self._cost(self._largest_shard(shape)).peak_bytes for shape in shapes)
        return flops, peak or largest + self._kept

    def _largest_shard(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        shard = self._largest.of(shape[0])
        return (shard.stop - shard.start, *shape[1:])

    def _cost(self, shape: tuple[int, ...]) -> Cost:
        if shape not in self._costs:
            self._costs[shape] = dry_cost(self._method, shape, precision=self._precision, cached=self._cached)
        return self._costs[shape]
