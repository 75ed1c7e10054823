"""What every loader is, and what those of this package share: passes, checks and normalisation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowcal.data.dataset import Split
from lowcal.errors import LowcalError

__all__ = ["Loader", "Normalise", "Passes", "Shard", "check_state"]


class Shard(NamedTuple):
    """Which part of each mini-batch is this process's, where `world` processes train together.

    The parts are as equal as can be, and the first one is never smaller than another; all images are in one of them.

    >>> [Shard(rank, 3).of(8) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> slice:
        """Its places among `count` images; none if there are fewer images than processes."""
        each, more = divmod(count, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))


class Loader(Protocol):
    """Mini-batches of one split, on the training device: all that training and evaluation know of data.

    A pass over it is an epoch: each image once, the last batch may be smaller. Where several processes train together,
    each is given its share of the same mini-batches, and only that: the others' images are not loaded.
    """

    @property
    def batch(self) -> int:
        """Images per batch, over all processes; may be set between passes."""

    @batch.setter
    def batch(self, value: int) -> None: ...

    @property
    def global_batch(self) -> int:
        """Images of the batch given out last, over all processes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @property
    def count(self) -> int:
        """Images in a pass, over all processes."""

    def __len__(self) -> int:
        """Batches in a pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start a pass, or go on with the one that `load_state_dict` brought; x (n, C, H, W) float32, y (n,) int64."""

    def raw_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The same pass, as what `collate` makes batches from: tensors on the device whose first dimension is n."""

    @property
    def collate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What gives the batch of what was drawn.

        It is work for the device alone and depends on nothing else, so that a recorded training step may hold it.
        """

    def sample_input(self, count: int) -> Tensor:
        """The first `count` images as evaluation sees them; moves no random state."""

    def state_dict(self) -> dict[str, Any]:
        """What the next batch depends on: tensors and plain values, also in the middle of a pass."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises LowcalError, and changes nothing, if the state is not of such a loader or of other data.
        """


class Passes(ABC):
    """What the loaders of this package have alike: passes over a `split` in mini-batches of `batch` images."""

    def __init__(self, split: Split, batch: int) -> None:
        self._split = split
        self.batch = batch

    @property
    def batch(self) -> int:
        """Images per batch; may be set between passes."""
        return self._batch

    @batch.setter
    def batch(self, value: int) -> None:
        _check_batch(value, len(self._split))
        self._batch = value

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self._split.shape

    @property
    def count(self) -> int:
        """Images in a pass."""
        return len(self._split)

    def __len__(self) -> int:
        return -(-len(self._split) // self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start a pass, or go on with the one that `load_state_dict` brought."""
        return (self.collate(*batch) for batch in self.raw_batches())

    @abstractmethod
    def raw_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """As `Loader`."""

    @abstractmethod
    def collate(self, *drawn: Any) -> tuple[Tensor, Tensor]:
        """As `Loader`."""


class Normalise:
    """From uint8 pixels (n, C, H, W) on `device` to float32, less `mean` and over `std`, which are on the scale 0 to 1.

    The result lies with its channels last in memory if asked for.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, device: torch.device, channels_last: bool
    ) -> None:
        mean_, std_ = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
        self._scale, self._shift = 1 / (255 * std_), -mean_ / std_
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the images normalised, without waiting for the device."""
        images = pixels.to(torch.float32, memory_format=self._memory_format, copy=True)
        return images.mul_(self._scale).add_(self._shift)


def _check_batch(batch: int, images: int) -> None:
    """Refuse a batch that is empty or larger than the data."""
    if batch < 1:
        raise LowcalError(f"batch is {batch}, but must be at least 1")
    if batch > images:
        raise LowcalError(f"batch is {batch}, larger than the data ({images} images): set it to at most {images}")


def check_state(state: Mapping[str, Any], keys: set[str], images: int) -> None:
    """Refuse a state that lacks one of `keys`, or is of another number of images."""
    if missing := keys - state.keys():
        raise LowcalError(f"state of the batches lacks {', '.join(sorted(missing))}: not one of ours")
    if state["images"] != images:
        raise LowcalError(
            f"state of the batches is of {state['images']} images, the data has {images}: resume with the same data"
        )
