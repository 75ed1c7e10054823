"""Training steps behind a boundary whose frozen layers are computed once for each image (`lowcal.Cached`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
        views: how many epochs' augmented images are stored at each boundary; None: the images are not augmented.
    """

    on_disk: bool = False
    limit: int | None = None
    half: bool = False
    views: int | None = None


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
            LowcalError: the images are not the same in each epoch and no views are stored, or the other way round.
        """
        if not isinstance(loader, Batches):
            raise LowcalError(
                "cache: these images are augmented or decoded for each mini-batch; take data in memory with "
                "--set data.augment=false --set data.random_erase=0, or cache=none"
            )
        if loader.mixing is not None:
            raise LowcalError("cache: mixed images cannot be cached; --set data.mixup=0 --set data.cutmix=0")
        if loader.augmentation is not None and options.views is None:
            raise LowcalError(
                "cache: images that change at random are cached only in a number of views; "
                "--set cache.views=4, or data.augment=false"
            )
        if loader.augmentation is None and options.views is not None:
            raise LowcalError(f"cache.views={options.views}: without augmentation all views are the same; leave it out")
        images = _ImagesOf(loader) if options.views is None else partial(_ImagesOf, loader)
        where = folder if options.on_disk else None
        network = method.cached(images, folder=where, limit=options.limit, half=options.half, views=options.views)
        return cls(network, loader.images.labels)

    @classmethod
    def of_batch(cls, method: Method, images: Tensor, labels: Tensor) -> tuple[Self, list[Tensor]]:
        """Only the images of one mini-batch, and their positions as a raw mini-batch, for dry runs."""
        return cls(method.cached(images), labels), [torch.arange(len(images), device=images.device)[:, None]]


class _ImagesOf:
    """The images of a loader by position: as they are, or augmented as in `epoch`."""

    def __init__(self, loader: Batches, epoch: int | None = None) -> None:
        self._loader = loader
        self._rows = None if epoch is None else loader.rows_in(epoch)

    def __len__(self) -> int:
        return self._loader.count

    def __getitem__(self, index: Tensor, /) -> Tensor:
        return self._loader.inputs_at(index) if self._rows is None else self._loader.collate(self._rows[index])[0]


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
        """Trains on one mini-batch, given by the positions of its images in the first column, (n, columns)."""
        (rows,) = batch
        index = rows[:, 0]
        with autocast(self._options.device, self._options.precision):
            crossing = self.cache.network.gather(index)
        return self.step(*crossing, self.cache.labels[index])
