"""What every loader of mini-batches does: passes, shards of several processes, normalisation, resuming."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor

from lowcal.data.dataset import Split
from lowcal.data.mixing import Mixing
from lowcal.errors import LowcalError


class Shard(NamedTuple):
    """The part of each mini-batch that belongs to process `rank` of `world` processes that train together.

    The parts are as equal as possible, and none is larger than the first. Each image is in one of them.

    >>> [Shard(rank, 3).of(8) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> slice:
        """Its positions among `count` images; none if there are fewer images than processes."""
        each, more = divmod(count, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))


class LoaderSettings(TypedDict, total=False):
    """The settings of each `Loader`.

    Attributes:
        batch: images per batch, over all processes.
        mean: per channel, on the scale 0 to 1.
        std: likewise.
        device: where x and y are; the processor by default.
        seed: of order and augmentation.
        shuffle: whether each pass has a new order.
        channels_last: whether x lies with its channels last in memory.
        shard: the part of each batch that this process gets; by default all of it.
        mixing: how images are mixed in pairs; by default they are not.
    """

    batch: Required[int]
    mean: Required[Sequence[float]]
    std: Required[Sequence[float]]
    device: torch.device | str
    seed: int
    shuffle: bool
    channels_last: bool
    shard: Shard
    mixing: Mixing | None


class Loader(ABC):
    """Mini-batches of one split on `device`: x float32 (n, C, H, W) normalised by `mean` and `std`, y int64 (n,).

    With `mixing`, y are probabilities, float32 (n, classes).

    A pass is an epoch: each image once; the last batch may be smaller. With `shuffle` each pass has a new order. Order
    and augmentation depend on `seed` and the epoch alone: not on `batch`, `shard`, `device` or any other random state,
    and no other random state changes. `state_dict` continues exactly, also in the middle of a pass.

    Where several processes train together, each gets its `shard` of the same mini-batches and loads only that.

    Attributes:
        global_batch: images of the last batch, over all processes.
    """

    def __init__(self, split: Split, **settings: Unpack[LoaderSettings]) -> None:
        self.device = torch.device(settings.get("device", "cpu"))
        self.seed = settings.get("seed", 0)
        self.shuffle = settings.get("shuffle", False)
        self.global_batch = 0
        self._split = split
        self._shard = settings.get("shard", Shard())
        self.mixing = settings.get("mixing")
        statistics = settings["mean"], settings["std"]
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in statistics)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._memory_format = torch.channels_last if settings.get("channels_last") else torch.contiguous_format
        self._position = 0  # images given out in the current pass
        self._resume_at = 0
        self.batch = settings["batch"]

    @property
    def batch(self) -> int:
        """Images per batch, over all processes; may be set between passes."""
        return self._batch

    @batch.setter
    def batch(self, value: int) -> None:
        if value < 1:
            raise LowcalError(f"batch is {value}, but must be at least 1")
        if value > self.count:
            raise LowcalError(
                f"batch is {value}, larger than the data ({self.count} images): set it to at most {self.count}"
            )
        self._batch = value

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self._split.shape

    @property
    def count(self) -> int:
        """Images in a pass, over all processes."""
        return len(self._split)

    def __len__(self) -> int:
        """Batches in a pass."""
        return -(-self.count // self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start a pass, or continue the one that `load_state_dict` restored; x and y of each batch."""
        return (self.collate(*raw) for raw in self.raw_batches())

    def raw_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The same pass as the arguments of `collate`: tensors on the device whose first dimension is n."""
        self._position, self._resume_at = self._resume_at, 0
        for size, raw in self._rest_of_pass():
            self.global_batch = size
            self._position += size
            yield raw
        self._position = 0

    @abstractmethod
    def _rest_of_pass(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """For each batch from `_position` on: its images over all processes, and this process's raw batch."""

    @abstractmethod
    def collate(self, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of a raw batch.

        It runs on the device alone and depends on nothing else, so that a recorded training step may contain it.
        """

    @abstractmethod
    def sample_input(self, count: int) -> Tensor:
        """The first `count` images as in evaluation; no random state changes."""

    def state_dict(self) -> dict[str, Any]:
        """What the next batch depends on: tensors and plain values."""
        return {"images": self.count, "batch": self._batch, "position": self._position, **self._random_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken: the next pass is the rest of that epoch.

        Raises:
            LowcalError: the state is not of such a loader, or of other data. Nothing is changed then.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise LowcalError(f"state of the batches lacks {', '.join(sorted(missing))}: not one of lowcal")
        if state["images"] != self.count:
            raise LowcalError(
                f"state of the batches is of {state['images']} images, the data has {self.count}: "
                "resume with the same data"
            )
        self.batch = state["batch"]
        self._position = self._resume_at = state["position"]
        self._load_random_state(state)

    @abstractmethod
    def _random_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_random_state(self, state: Mapping[str, Any]) -> None: ...

    def _normalise(self, pixels: Tensor) -> Tensor:
        """From uint8 to float32, minus mean, over deviation, without waiting for the device."""
        images = pixels.to(torch.float32, memory_format=self._memory_format, copy=True)
        return images.mul_(self._scale).add_(self._shift)
