"""The training step of one of several processes, each with its share of the mini-batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lowcal.methods import Method
from lowcal.training.ranks import Ranks
from lowcal.training.step import EagerStep, StepOptions


class RankedStep(EagerStep):
    """The step that one process would take with the whole mini-batch, up to rounding.

    Shares may differ in size, and be empty. Normalisation layers see their share alone, unless they are made to
    exchange their statistics. What the network draws at random (dropout) differs from process to process.

    Args:
        ranks: all processes.
    """

    def __init__(self, optimizer: Optimizer, method: Method, options: StepOptions, *, ranks: Ranks) -> None:
        places = [ranks.device.index] if ranks.device.type == "cuda" else None
        super().__init__(method.parallel(device_ids=places), optimizer, method, options)
        self._ranks = ranks

    def __call__(self, *given: Tensor) -> Tensor:
        """Trains on this process's share; gives the mean over all shares."""
        with self._ranks.own_draws():
            return super().__call__(*given)

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        own = F.cross_entropy(self._model(images), labels, reduction="sum")
        count = torch.full((), len(labels), dtype=own.dtype, device=own.device)
        total, count = self._ranks.sum(torch.stack((own.detach(), count))).unbind()
        # The gradients are averaged over the processes, whose number takes that back.
        return total / count, own * (self._ranks.world / count)
