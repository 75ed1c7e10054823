"""Training steps behind a boundary whose frozen layers are computed once for each image (`lowcal.Cached`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lowcal.cache import Cached
from lowcal.data import Batches, Loader
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.steps.step import Step, StepOptions, autocast


@dataclass(frozen=True)
class CacheOptions:
    """How frozen layers are cached.

    Attributes:
        on_disk: whether in the run's folder, else in the memory of the device.
        limit: the most bytes; None: those that are free.
        half: whether single precision is stored as float16.
    """

    on_disk: bool = False
    limit: int | None = None
    half: bool = False


@dataclass(frozen=True)
class CachedBatches:
    """The images of a run for steps behind the boundary.

    Attributes:
        network: takes their positions.
        labels: class numbers, (N,), on the device.
    """

    network: Cached
    labels: Tensor

    @classmethod
    def of_run(cls, method: Method, loader: Loader, options: CacheOptions, folder: Path) -> Self:
        """All images of `loader`.

        Raises:
            LowcalError: the images are not the same in each epoch.
        """
        if not isinstance(loader, Batches):
            raise LowcalError(
                "cache: these images are augmented or decoded for each mini-batch; take data in memory with "
                "--set data.augment=false --set data.random_erase=0, or cache=none"
            )
        if loader.mixing is not None:
            raise LowcalError("cache: mixed images cannot be cached; --set data.mixup=0 --set data.cutmix=0")
        if loader.augmentation is not None:
            raise LowcalError("cache: images that change at random cannot be cached; --set data.augment=false")
        where = folder if options.on_disk else None
        network = method.cached(_ImagesOf(loader), folder=where, limit=options.limit, half=options.half)
        return cls(network, loader.images.labels)

    @classmethod
    def of_batch(cls, method: Method, images: Tensor, labels: Tensor) -> tuple[Self, list[Tensor]]:
        """Only the images of one mini-batch, and their positions as a raw mini-batch, for dry runs."""
        return cls(method.cached(images), labels), [torch.arange(len(images), device=images.device)[:, None]]


class _ImagesOf:
    """The images of a loader by position."""

    def __init__(self, loader: Batches) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return self._loader.count

    def __getitem__(self, index: Tensor, /) -> Tensor:
        return self._loader.inputs_at(index)


class CachedStep:
    """A step that takes what crosses the boundary from the cache.

    Args:
        step: trains the layers behind the boundary on that.
        cache: the images.
        options: those of the step.
    """

    def __init__(self, step: Step, cache: CachedBatches, options: StepOptions) -> None:
        self.step, self.cache, self._options = step, cache, options

    @property
    def skipped(self) -> Tensor | None:
        """See `Step`."""
        return self.step.skipped

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch, given by the positions of its images in the first column, (n, 1)."""
        (rows,) = batch
        index = rows[:, 0]
        with autocast(self._options.device, self._options.precision):
            crossing = self.cache.network.gather(index)
        return self.step(*crossing, self.cache.labels[index])
