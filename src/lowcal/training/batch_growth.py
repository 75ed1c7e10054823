"""A mini-batch that grows into the memory that a moving boundary frees (Sec. 3.2, Figure 4)."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def predicted_peak(peak: int, held: int, factor: int = 2) -> int:
    """Bytes that a step takes with `factor` times the images, where one takes `peak` now.

    Args:
        held: of `peak`, what is there throughout a step and does not grow with the images: weights, buffers and
            optimizer state. Gradients, which are there for a part of it, are left to what grows: better too much.
    """
    return held + factor * (peak - held)


def next_batch(batch: int, *, peak: int, held: int, limit: int, most: int) -> int:
    """Twice the batch if a step with it takes at most `limit` bytes and it is at most `most` images, else the batch."""
    fits = 2 * batch <= most and predicted_peak(peak, held) <= limit
    return 2 * batch if fits else batch


class BatchGrowth:
    """How many images a mini-batch has from epoch to epoch, and whether that was found to fit.

    After an epoch that followed a move, the batch doubles if the epoch's peak of memory says that it fits. The first
    epoch with a new batch is a trial: where memory runs out in it, the batch before comes back for good.

    Args:
        batch: images in the first epoch's mini-batches.
        most: images that a mini-batch may have at most.
        limit: bytes that a step may take; None: what one took in the first epoch.
        scale_lr: whether SGD's learning rate grows with the batch.

    Attributes:
        batch: images in a mini-batch of the coming epoch.
        on_trial: whether it is the first epoch with as many.
        refused: images with which memory ran out; None if it never did.
    """

    def __init__(self, batch: int, *, most: int, limit: int | None = None, scale_lr: bool = False) -> None:
        self.batch = batch
        self.on_trial = False
        self.refused: int | None = None
        self._first = batch
        self._most = most
        self._limit = limit
        self._scale_lr = scale_lr
        self._is_freed = False  # whether there was a move since the batch grew last

    @property
    def proven(self) -> int:
        """Images in the largest mini-batch that an epoch has been trained with."""
        return self.batch // 2 if self.on_trial else self.batch

    @property
    def lr_factor(self) -> float:
        """What SGD's learning rate is multiplied by."""
        return self.batch / self._first if self._scale_lr else 1.0

    def end_epoch(self, peak: int, held: int, *, moved: bool) -> bool:
        """Takes in what an epoch needed; the same arguments lead to the same decision.

        Args:
            peak: most bytes that one of its steps took; of several devices' the largest.
            held: bytes that the network and its optimizer hold throughout a step.
            moved: whether the boundary moved at its end.

        Returns:
            Whether the batch is larger from the next epoch on.
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
        """Goes back to the batch before the one on trial, never to try that one again."""
        self.refused, self.batch = self.batch, self.proven
        self.on_trial = False

    def state_dict(self) -> dict[str, Any]:
        """All of it: plain values."""
        return {
            "batch": self.batch,
            "on_trial": self.on_trial,
            "refused": self.refused,
            "limit": self._limit,
            "is_freed": self._is_freed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.batch, self.on_trial, self.refused = state["batch"], state["on_trial"], state["refused"]
        self._limit, self._is_freed = state["limit"], state["is_freed"]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that led to it, is what torch raises when there is no memory left."""
    words = (
        "DefaultCPUAllocator",
        "CUDA error: out of memory",
        "_STATUS_ALLOC_FAILED",  # of cuBLAS, cuDNN
        "unable to find an engine",  # cuDNN has tried all its algorithms, and for none there is memory
    )
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__  # a capture that is broken off raises an error of its own
    return False


def cpu_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state` on the processor, which nothing that happens to the original changes."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(state))


def release_memory(device: torch.device) -> None:
    """Gives back what a broken-off step held of `device`, once no error refers to it any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
