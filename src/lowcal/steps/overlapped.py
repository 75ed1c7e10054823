"""The eager step with the products of local updates on a second stream; worth its cost only when it is recorded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal import overlap
from lowcal.steps.step import EagerStep, Learning, StepOptions


class OverlappedStep(EagerStep):
    """The eager step, with the products of local updates next to the rest of forward and backward pass.

    Attributes:
        overlap: runs the products.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions
    ) -> None:
        super().__init__(model, optimizers, learning, options)
        self.overlap = overlap.Overlap(overlap.STREAM(options.device), overlap.HELD_BYTES)
        self._seen: set[Hashable] = set()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch; see `Step`."""
        kind = (tuple((tensor.shape, tensor.dtype) for tensor in batch), self._learning.phase)
        with self.overlap.step(first=kind not in self._seen), self._learning.overlapped(self.overlap):
            loss = super().__call__(*batch)
        self._seen.add(kind)
        return loss
