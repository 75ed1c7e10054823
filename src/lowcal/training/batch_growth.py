"""A mini-batch that grows into the memory that a move of the boundary frees (Sec. 3.2, Figure 4)."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def predicted_peak(peak: int, held: int, factor: int = 2) -> int:
    """Bytes that a step takes with `factor` times the images, if it takes `peak` now.

    Args:
        held: the part of `peak` that lasts throughout a step and does not grow with the images: weights, buffers and
            optimizer state. Gradients are counted as growing, so that the prediction is too high rather than too low.
    """
    return held + factor * (peak - held)


def next_batch(batch: int, *, peak: int, held: int, limit: int, most: int) -> int:
    """Twice the batch if that is at most `most` images and a step takes at most `limit` bytes, else the batch."""
    fits = 2 * batch <= most and predicted_peak(peak, held) <= limit
    return 2 * batch if fits else batch


class BatchGrowth:
    """Decides how many images a mini-batch has from epoch to epoch.

    After an epoch that followed a move, the batch doubles if the epoch's peak of memory predicts that it fits. The
    first epoch with a new batch is a trial: if memory runs out in it, the batch before it returns for good.

    Args:
        batch: images in a mini-batch of the first epoch.
        most: most images that a mini-batch may have.
        limit: bytes that a step may take; None: what one took in the first epoch.
        scale_lr: whether SGD's learning rate grows with the batch.

    Attributes:
        batch: images in a mini-batch of the next epoch.
        on_trial: whether that epoch is the first one with this batch.
        refused: the batch with which memory ran out; None if it never did.
    """

    def __init__(self, batch: int, *, most: int, limit: int | None = None, scale_lr: bool = False) -> None:
        self.batch = batch
        self.on_trial = False
        self.refused: int | None = None
        self._first = batch
        self._most = most
        self._limit = limit
        self._scale_lr = scale_lr
        self._is_freed = False  # whether there was a move since the batch last grew

    @property
    def proven(self) -> int:
        """Images in the largest mini-batch that an epoch has been trained with."""
        return self.batch // 2 if self.on_trial else self.batch

    @property
    def lr_factor(self) -> float:
        """The factor of SGD's learning rate."""
        return self.batch / self._first if self._scale_lr else 1.0

    def end_epoch(self, peak: int, held: int, *, moved: bool) -> bool:
        """Decides the batch of the next epoch; the same arguments lead to the same decision.

        Args:
            peak: most bytes that a step of the finished epoch took, on any device.
            held: bytes that the network and its optimizer hold throughout a step.
            moved: whether the boundary moved at the end of the epoch.

        Returns:
            Whether the batch has grown.
        """
        if self._limit is None:
            self._limit = peak
        batch = self.batch
        if self._is_freed and self.refused is None:
            self.batch = next_batch(batch, peak=peak, held=held, limit=self._limit, most=self._most)
        self.on_trial = self.batch > batch
        self._is_freed = moved or (self._is_freed and not self.on_trial)
        return self.on_trial

    def refuse(self) -> None:
        """Returns to the batch before the one on trial, which is never tried again."""
        self.refused, self.batch = self.batch, self.proven
        self.on_trial = False

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        return {
            "batch": self.batch,
            "on_trial": self.on_trial,
            "refused": self.refused,
            "limit": self._limit,
            "is_freed": self._is_freed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self.batch, self.on_trial, self.refused = state["batch"], state["on_trial"], state["refused"]
        self._limit, self._is_freed = state["limit"], state["is_freed"]


def cpu_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state` on the CPU that shares nothing with the original."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(state))


def release_memory(device: torch.device) -> None:
    """Frees what an interrupted step held of `device`; no error may refer to it any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
