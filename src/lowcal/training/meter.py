"""What a run's epochs cost: FLOPs, and the most memory that a step takes."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch

from lowcal.data import Shard
from lowcal.methods import Method
from lowcal.training.cost import Cost, dry_cost, held_bytes


class Meter:
    """Counts an epoch's FLOPs by dry runs, its memory by the device where that can, else by dry runs too.

    Args:
        method: attached to the network; `renew` is to be called when either changes.
        device: where the network is.
        precision: of its steps.
        world: processes among which each mini-batch is shared out.
    """

    def __init__(self, method: Method, device: torch.device, precision: str, world: int = 1) -> None:
        self._method, self._device, self._precision = method, device, precision
        self._largest = Shard(0, world)
        self._costs: dict[tuple[int, ...], Cost] = {}
        # Bytes, in the epochs since `renew`: a step that the device replays allocates in the first alone.
        self._most = 0
        self._others = 0  # bytes on the device that belong to data sets and to other runs

    def renew(self) -> None:
        """Forgets what steps cost."""
        self._costs.clear()
        self._most = 0

    def start(self) -> None:
        """Starts the count of peak memory."""
        if self._device.type == "cuda":
            gc.collect()  # a copy from warming up that went within the epoch would count as another run's
            torch.cuda.reset_peak_memory_stats(self._device)
            own = held_bytes(self._method.model, self._method.optimizer)
            self._others = torch.cuda.memory_allocated(self._device) - own

    def held(self) -> int:
        """Bytes that the network and its optimizer hold throughout a step; gradients come and go within it."""
        return held_bytes(self._method.model, self._method.optimizer, gradients=False)

    def peak(self) -> int:
        """Most bytes that steps like the present one have taken; 0 on a device that does not count them."""
        if self._device.type == "cuda":
            self._most = max(self._most, torch.cuda.max_memory_allocated(self._device) - self._others)
        return self._most

    def count(self, shapes: Mapping[tuple[int, ...], int], peak: int) -> tuple[int, int]:
        """FLOPs of so many steps of images of such shapes, and a device's bytes in one: `peak`, unless that is 0.

        The shapes and the FLOPs are of all processes, the bytes of the one that has most.
        """
        flops = sum(self._cost(shape).flops * count for shape, count in shapes.items())
        return flops, peak or max(self._cost(self._on_one(shape)).peak_bytes for shape in shapes)

    def _on_one(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        share = self._largest.of(shape[0])
        return (share.stop - share.start, *shape[1:])

    def _cost(self, shape: tuple[int, ...]) -> Cost:
        if shape not in self._costs:
            self._costs[shape] = dry_cost(self._method, shape, precision=self._precision)
        return self._costs[shape]
