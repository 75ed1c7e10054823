"""Mini-batches on the training device: of images in memory, and of images that worker processes make."""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowcal.data.dataset import Augmentation, Dataset, Files, Images
from lowcal.data.images import Task
from lowcal.data.loader import Loader, LoaderSettings, Shard
from lowcal.data.mixing import partners


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

    def _rest_of_pass(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Raw batches are int64 (n, 1), the images' positions.

        With augmentation they are (n, 4): position, offset down, offset right, and whether the image is flipped. With
        mixing the same follows for the images that they are mixed with, and rows that `Mixing.draw` returned.
        """
        self._epoch_start = self._random.get_state()
        plan = [tensor.to(self.device) for tensor in self._draw()]
        while self._position < self.count:
            rows = [tensor[self._position : self._position + self._batch] for tensor in plan]
            size = len(rows[0])
            yield size, tuple(tensor[self._shard.of(size)] for tensor in rows)

    def collate(self, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """As `Loader`."""
        if self.mixing is None:
            return self._augmented(*raw)
        rows, others, drawn = raw
        return self.mixing.mix(*self._augmented(rows), *self._augmented(others), drawn)

    def _augmented(self, rows: Tensor) -> tuple[Tensor, Tensor]:
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
            rows, *_ = self._draw()
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

    def _draw(self) -> list[Tensor]:
        """What the raw batches of an epoch are slices of, on the CPU."""
        count, random = self.count, self._random
        columns = [torch.randperm(count, generator=random) if self.shuffle else torch.arange(count)]
        if self.augmentation is not None:
            reach = 2 * self.augmentation.pad + 1
            bounds = reach, reach, 1 + self.augmentation.flip
            columns += [torch.randint(bound, (count,), generator=random) for bound in bounds]
        plan = torch.stack(columns, dim=1)
        if self.mixing is None:
            return [plan]
        return [plan, plan[partners(torch.arange(count), count)], self.mixing.draw(count, self.shape, random)]


def _crop_and_flip(pixels: Tensor, drawn: Tensor, augmentation: Augmentation) -> Tensor:
    """Shift each image by up to `pad` pixels each way over black, and flip it, as `drawn` (n, 3) says."""
    count, _, height, width = pixels.shape
    down, right, flip = drawn.unbind(1)
    sources = pad(pixels, (augmentation.pad,) * 4)
    sources = torch.stack((sources, sources.flip(3))) if augmentation.flip else sources[None]
    windows = sources.unfold(3, height, 1).unfold(4, width, 1)
    return windows[flip, torch.arange(count, device=pixels.device), :, down, right]


class FileBatches(Loader):
    """A loader of images that worker processes make ahead of their use; with `augment` each is changed at random.

    The order depends on (seed, epoch) and each change on (seed, epoch, position). Pixels move to the device as uint8. A
    file that cannot be read stops the pass with a LowcalError that names it.
    """

    def __init__(self, files: Files, *, augment: bool = False, **settings: Unpack[LoaderSettings]) -> None:
        super().__init__(files, **settings)
        self.files = files
        self.augment = augment
        self._begun = 0  # passes

    def _rest_of_pass(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Raw batches are pixels uint8 (n, C, H, W) and labels int64 (n,).

        With mixing the same follows for the images that they are mixed with, and rows that `Mixing.draw` returned.
        """
        if self._position == 0:
            self._begun += 1
        epoch, batch, pin = self._begun - 1, self._batch, self.device.type == "cuda"
        drawn = self._drawn(epoch)
        for decoded in self.files.decoders.run(self._tasks(epoch, self._position, batch), pin=pin):
            pixels, labels = map(self._move, decoded)
            size, own = min(batch, self.count - self._position), self._own(self._position, batch)
            if drawn is None:
                yield size, (pixels, labels)
                continue
            index = torch.arange(own.start, own.stop, device=self.device)
            first = self._with_partners(own).start
            pairs = [tensor[at - first] for at in (index, partners(index, self.count)) for tensor in (pixels, labels)]
            yield size, (*pairs, self._move(drawn[own.start : own.stop]))

    def collate(self, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """As `Loader`."""
        if self.mixing is None:
            pixels, labels = raw
            return self._normalise(pixels), labels
        pixels, labels, other_pixels, other_labels, drawn = raw
        return self.mixing.mix(self._normalise(pixels), labels, self._normalise(other_pixels), other_labels, drawn)

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
            index = order[self._with_partners(self._own(first, batch))]
            labels = self.files.labels[index].tolist()
            yield [
                Task(self.files.paths[i], label, _mixed(seed, epoch, i) if self.augment else None)
                for i, label in zip(index.tolist(), labels, strict=True)
            ]

    def _drawn(self, epoch: int) -> Tensor | None:
        if self.mixing is None:
            return None
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch, self.count))  # no image has this number
        return self.mixing.draw(self.count, self.shape, generator)

    def _own(self, first: int, batch: int) -> slice:
        """This process's places, in the epoch's order, of a batch that begins at place `first`."""
        own = self._shard.of(min(batch, self.count - first))
        return slice(first + own.start, first + own.stop)

    def _with_partners(self, own: slice) -> slice:
        """These places with those of the images that they are mixed with: whole pairs."""
        if self.mixing is None or own.start == own.stop:
            return own
        return slice(own.start // 2 * 2, min(-(-own.stop // 2) * 2, self.count))

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
        channels_last=channels_last, shard=shard, mixing=data.mixing if training else None,
    )  # fmt: skip
    if isinstance(images, Images):
        return Batches(images, augmentation=data.augmentation if training else None, **settings)
    return FileBatches(images, augment=training and data.augment, **settings)
