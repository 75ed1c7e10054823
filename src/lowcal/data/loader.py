"""Mini-batches on the training device: order, augmentation, normalisation, and resuming at any batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowcal.data.dataset import Augmentation, Dataset, Files, Images, Split
from lowcal.data.images import Task
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
    """

    batch: Required[int]
    mean: Required[Sequence[float]]
    std: Required[Sequence[float]]
    device: torch.device | str
    seed: int
    shuffle: bool
    channels_last: bool
    shard: Shard


class Loader(ABC):
    """Mini-batches of one split on `device`: x float32 (n, C, H, W) normalised by `mean` and `std`, y int64 (n,).

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


class Batches(Loader):
    """A loader of images in memory, which move to the device once and are augmented there.

    The order and all crops and flips of an epoch are drawn when it begins. No step waits for the device.

    >>> images = Images(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
    >>> [len(y) for x, y in Batches(images, batch=4, mean=(0.5,), std=(0.5,))]
    [4, 4, 2]
    """

    def __init__(
        self, images: Images, *, augmentation: Augmentation | None = None, **settings: Unpack[LoaderSettings]
    ) -> None:
        self.images = images.to(settings.get("device", "cpu"))
        self.augmentation = augmentation
        super().__init__(self.images, **settings)
        self._random = torch.Generator().manual_seed(self.seed)
        self._epoch_start = self._random.get_state()

    def _rest_of_pass(self) -> Iterator[tuple[int, tuple[Tensor]]]:
        """Raw batches are int64 (n, 1), the images' positions.

        With augmentation they are (n, 4): position, offset down, offset right, and whether the image is flipped.
        """
        self._epoch_start = self._random.get_state()
        plan = self._draw().to(self.device)
        while self._position < len(plan):
            rows = plan[self._position : self._position + self._batch]
            yield len(rows), (rows[self._shard.of(len(rows))],)

    def collate(self, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """As `Loader`."""
        (rows,) = raw
        index = rows[:, 0]
        pixels = self.images.pixels_at(index)
        if self.augmentation is not None:
            pixels = _crop_and_flip(pixels, rows[:, 1:], self.augmentation)
        return self._normalise(pixels), self.images.labels[index]

    def inputs_at(self, index: Tensor) -> Tensor:
        """x, without augmentation, of the images at the positions `index`, int64 (n,)."""
        return self._normalise(self.images.pixels_at(index.to(self.device)))

    def rows_in(self, epoch: int) -> Tensor:
        """The raw mini-batches of `epoch`, counted from 0, as one, in the order of the images; drawn again."""
        before = self._random.get_state()
        self._random.manual_seed(self.seed)
        for _ in range(epoch + 1):
            rows = self._draw()
        self._random.set_state(before)
        return rows[rows[:, 0].argsort()].to(self.device)

    def sample_input(self, count: int) -> Tensor:
        """As `Loader`."""
        return self.inputs_at(torch.arange(min(count, self.count)))

    def _random_state(self) -> dict[str, Any]:
        return {"random": self._epoch_start if self._position else self._random.get_state()}

    def _load_random_state(self, state: Mapping[str, Any]) -> None:
        self._random.set_state(state["random"].cpu())
        self._epoch_start = self._random.get_state()

    def _draw(self) -> Tensor:
        count, random = self.count, self._random
        columns = [torch.randperm(count, generator=random) if self.shuffle else torch.arange(count)]
        if self.augmentation is not None:
            reach = 2 * self.augmentation.pad + 1
            bounds = reach, reach, 1 + self.augmentation.flip
            columns += [torch.randint(bound, (count,), generator=random) for bound in bounds]
        return torch.stack(columns, dim=1)


def _crop_and_flip(pixels: Tensor, drawn: Tensor, augmentation: Augmentation) -> Tensor:
    """Shift each image by up to `pad` pixels each way over black, and flip it, as `drawn` (n, 3) says."""
    count, _, height, width = pixels.shape
    down, right, flip = drawn.unbind(1)
    sources = pad(pixels, (augmentation.pad,) * 4)
    sources = torch.stack((sources, sources.flip(3))) if augmentation.flip else sources[None]
    windows = sources.unfold(3, height, 1).unfold(4, width, 1)
    return windows[flip, torch.arange(count, device=pixels.device), :, down, right]


class FileBatches(Loader):
    """A loader of image files, decoded ahead of their use; with `augment` each has a new random-resized crop and flip.

    The order depends on (seed, epoch) and each crop on (seed, epoch, position). Pixels move to the device as uint8. A
    file that cannot be read stops the pass with a LowcalError that names it.
    """

    def __init__(self, files: Files, *, augment: bool = False, **settings: Unpack[LoaderSettings]) -> None:
        super().__init__(files, **settings)
        self.files = files
        self.augment = augment
        self._begun = 0  # passes

    def _rest_of_pass(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Raw batches are pixels uint8 (n, 3, H, W) and labels int64 (n,)."""
        if self._position == 0:
            self._begun += 1
        batch, pin = self._batch, self.device.type == "cuda"
        for pixels, labels in self.files.decoders.run(self._tasks(self._begun - 1, self._position, batch), pin=pin):
            yield min(batch, self.count - self._position), (self._move(pixels), self._move(labels))

    def collate(self, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """As `Loader`."""
        pixels, labels = raw
        return self._normalise(pixels), labels

    def sample_input(self, count: int) -> Tensor:
        """As `Loader`."""
        labels = self.files.labels[:count].tolist()
        tasks = [Task(path, label, None) for path, label in zip(self.files.paths, labels, strict=False)]
        pixels, _ = self.files.decoders.decode(tasks)
        return self._normalise(self._move(pixels))

    def _random_state(self) -> dict[str, Any]:
        return {"seed": self.seed, "epoch": self._begun - 1 if self._position else self._begun}

    def _load_random_state(self, state: Mapping[str, Any]) -> None:
        self.seed = state["seed"]
        self._begun = state["epoch"] + (1 if self._position else 0)

    def _tasks(self, epoch: int, start: int, batch: int) -> Iterator[list[Task]]:
        count, seed = self.count, self.seed
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for first in range(start, count, batch):
            index = order[first : first + batch]
            index = index[self._shard.of(len(index))]
            labels = self.files.labels[index].tolist()
            yield [
                Task(self.files.paths[i], label, _mixed(seed, epoch, i) if self.augment else None)
                for i, label in zip(index.tolist(), labels, strict=True)
            ]

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _mixed(*values: int) -> int:
    """A seed of 64 bits that differs for other values."""
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest())


def make_loader(
    data: Dataset,
    *,
    training: bool,
    batch: int,
    device: torch.device | str,
    seed: int = 0,
    channels_last: bool = False,
    shard: Shard = Shard(),  # noqa: B008  (immutable)
) -> Loader:
    """The loader of the training images, in a new order and augmented in each pass, or of the test images unchanged."""
    images = data.train if training else data.test
    settings = LoaderSettings(
        batch=batch, mean=data.mean, std=data.std, device=device, seed=seed, shuffle=training,
        channels_last=channels_last, shard=shard,
    )  # fmt: skip
    if isinstance(images, Images):
        return Batches(images, augmentation=data.augmentation if training else None, **settings)
    return FileBatches(images, augment=training, **settings)
