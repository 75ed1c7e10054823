"""What training costs: FLOPs and memory of a step from a dry run that computes nothing, and of a run's epochs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lowcal.data import Shard
from lowcal.dry_run import LiveBytes, empty_copies, make_state
from lowcal.methods import Method
from lowcal.program import Suffix, record
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


def dry_cost(
    method: Method,
    shape: Sequence[int],
    *,
    precision: str = "float32",
    cached: bool = False,
    boundary: int | None = None,
) -> Cost:
    """The cost of one training step of `method`, from a copy of its network without data.

    Args:
        method: attached to a network; neither changes.
        shape: of the mini-batch's images, (N, C, H, W).
        precision: "float32", "bf16" or "fp16".
        cached: whether the layers before the boundary are computed once for each image.
        boundary: at which the step is; None: the present one.
    """
    # Autocast ignores meta tensors but converts fake ones, which are slower. Only what is made here may be fake: a
    # method still draws real numbers.
    is_mixed = PRECISIONS[precision] is not None
    device = torch.device("cpu" if is_mixed else "meta")
    with torch.random.fork_rng([]), LiveBytes() as live:
        with FakeTensorMode(allow_non_fake_inputs=True) if is_mixed else nullcontext():
            model, (optimizer,) = empty_copies(method.model, [method.optimizer], device)
            images = torch.empty(*shape, device=device)
            labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
        twin = method.twin(model, optimizer, images)
        if boundary is not None:
            twin.move_to(boundary)
        model.train()
        make_state(optimizer)
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

    def count(self, shapes: Mapping[tuple[int, ...], int], peak: int, *, fills: int = 0) -> tuple[int, int]:
        """The FLOPs of steps, and the most bytes that one of them takes on a device.

        Args:
            shapes: how many steps there were for each shape of images, over all processes.
            peak: the bytes if the device counted them, else 0.
            fills: how often the cache is filled for all images in these steps: once for each view.
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
