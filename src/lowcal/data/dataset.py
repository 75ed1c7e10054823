"""Images in memory or in files: channel statistics, stratified subsets and splits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lowcal.data.images import Decoders
from lowcal.data.mixing import Mixing
from lowcal.errors import LowcalError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Images:
    """Decoded images: `pixels` uint8 (N, C, H, W), `labels` int64 (N,).

    With `rows`, int64 (N,), several images share pixels: image i has the pixels at `rows[i]`.
    """

    pixels: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def statistics(self) -> Statistics:
        """Mean and standard deviation per channel, on the scale 0 to 1, from histograms.

        A constant channel gets the deviation 1, so that normalising it gives zeros.
        """
        levels = torch.arange(256, dtype=torch.float64) / 255
        frequency = torch.zeros(self.pixels.shape[1], 256, dtype=torch.float64)
        for part in self.pixels.split(1024):
            for channel in range(part.shape[1]):
                frequency[channel] += torch.bincount(part[:, channel].flatten(), minlength=256).cpu()
        frequency /= frequency.sum(1, keepdim=True)
        mean = frequency @ levels
        std = (frequency * (levels - mean[:, None]).square()).sum(1).sqrt()
        std[std < 1e-6] = 1.0
        return tuple(mean.tolist()), tuple(std.tolist())

    def enlarged(self, size: int | None, channels: int | None) -> Self:
        """The images at `size` x `size` pixels, grey ones repeated in `channels`; None: their own."""
        pixels = self.pixels
        if size is not None and self.shape[1:] != (size, size):
            large = torch.empty(len(pixels), self.shape[0], size, size, dtype=torch.uint8)
            for part, into in zip(pixels.split(256), large.split(256), strict=True):  # in float only a part at a time
                into.copy_(interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round())
            pixels = large
        if channels is not None and self.shape[0] == 1:
            pixels = pixels.expand(-1, channels, -1, -1).contiguous()
        return type(self)(pixels, self.labels, self.rows)

    def pixels_at(self, index: Tensor) -> Tensor:
        """The pixels, uint8 (n, C, H, W), of the images at the positions `index`, int64 (n,)."""
        return self.pixels[index if self.rows is None else self.rows[index]]

    def to(self, device: torch.device | str) -> Self:
        """The images on `device`; images that are already there share their memory."""
        rows = None if self.rows is None else self.rows.to(device)
        return type(self)(self.pixels.to(device), self.labels.to(device), rows)

    def take(self, index: Tensor) -> Self:
        """The images at the positions `index`, int64 (n,); their pixels are copied unless `rows` shares them."""
        if self.rows is None:
            return type(self)(self.pixels[index], self.labels[index])
        return type(self)(self.pixels, self.labels[index], self.rows[index])


@dataclass(frozen=True)
class Files:
    """Images that worker processes make for each batch: files with their `paths`, and their `labels` int64 (N,).

    For images in memory the paths are positions. `mean` and `std` per channel, on the scale 0 to 1, are constants for
    files, because measuring them would decode every one.
    """

    paths: Sequence[str | int]
    labels: Tensor
    decoders: Decoders
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.decoders.shape

    def statistics(self) -> Statistics:
        """Mean and standard deviation per channel."""
        return self.mean, self.std

    def to(self, device: torch.device | str) -> Self:
        """The files unchanged: decoded images move to a device batch by batch."""
        return self

    def take(self, index: Tensor) -> Self:
        """The files at the positions `index`, int64 (n,)."""
        paths = tuple(self.paths[i] for i in index.tolist())
        return replace(self, paths=paths, labels=self.labels[index])


Split = Images | Files


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the image padded with `pad` black pixels on each side, flipped half the time if `flip`."""

    pad: int
    flip: bool


@dataclass(frozen=True)
class Source:
    """A dataset as it is read, before subsets and splits."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    augmentation: Augmentation | None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Training and test images; `mean` and `std` per channel of the training images on the scale 0 to 1.

    `augmentation` suits the kind of image (digits are not flipped); it is None for files, which are cropped and flipped
    when they are decoded. `augment`: whether worker processes, where there are any, change training images at random;
    `mixing`: how these are mixed in pairs. `skipped` names each file left out and why. `whole` is the number of
    training and test images before subsets and splits, as published where there is a publication; `folder` is the name
    of an image-folder. `read_shape` is that of the images as they are read, before they are enlarged.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None
    skipped: tuple[str, ...] = ()
    whole: tuple[int, int] | None = None
    folder: str | None = None
    augment: bool = True
    mixing: Mixing | None = None
    read_shape: tuple[int, int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.train.shape

    def to(self, device: torch.device | str) -> Self:
        """The dataset with its images on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def subset(images: Split, count: int, seed: int, what: str) -> Split:
    """Draw `count` images, stratified by class; `what` names the setting in errors."""
    if count > len(images):
        raise LowcalError(
            f"{what} is {count}, but there are only {len(images)} images: set it to at most {len(images)}"
        )
    classes = len(images.labels.unique())
    if count < classes:
        raise LowcalError(f"{what} is {count}, fewer than the {classes} classes: set it to at least {classes}")
    if count == len(images):
        return images
    return images.take(_stratified(images.labels, count, seed))


def split(images: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split into the rest and a held-out `fraction`, stratified by class."""
    classes = len(images.labels.unique())
    count = round(fraction * len(images))
    if not classes <= count <= len(images) - classes:
        raise LowcalError(
            f"data.validation_fraction is {fraction}: of {len(images)} images in {classes} classes that leaves "
            f"{len(images) - count} to train on and {count} to validate on, and each needs at least {classes}"
        )
    held = torch.zeros(len(images), dtype=torch.bool)
    held[_stratified(images.labels, count, seed)] = True
    return images.take((~held).nonzero()[:, 0]), images.take(held.nonzero()[:, 0])


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Positions, ascending, of a random draw; the classes' counts are rounded by largest remainder."""
    generator = torch.Generator().manual_seed(seed)
    present, sizes = labels.cpu().unique(return_counts=True)
    exact = sizes.double() * count / len(labels)
    quota = exact.floor().long().clamp(min=1)  # no class is lost
    missing = count - int(quota.sum())
    by_need = (exact - quota).argsort(descending=True, stable=True)
    if missing > 0:
        quota[by_need[:missing]] += 1
    for _ in range(-missing):
        quota[(quota - exact).masked_fill(quota <= 1, -torch.inf).argmax()] -= 1
    chosen = []
    for label, size in zip(present.tolist(), quota.tolist(), strict=True):
        members = (labels.cpu() == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:size]])
    return torch.cat(chosen).sort().values
