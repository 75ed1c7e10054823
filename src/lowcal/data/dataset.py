"""Images in memory, and what is drawn from them: channel statistics, stratified subsets and splits."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowcal.errors import LowcalError

__all__ = ["Augmentation", "Dataset", "Images", "Source", "channel_statistics", "split", "subset"]


@dataclass(frozen=True)
class Images:
    """Decoded images: `pixels` uint8 (N, C, H, W), `labels` int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        """Return the images on `device`; those that are there already share their memory."""
        return type(self)(self.pixels.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return the images at the positions `index`, int64 (n,), as a copy."""
        return type(self)(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the image padded with `pad` black pixels on each side, and a mirror image half the time."""

    pad: int
    flip: bool


@dataclass(frozen=True)
class Source:
    """What a dataset's own module reads, before anything is drawn from it."""

    classes: tuple[str, ...]
    train: Images
    test: Images
    augmentation: Augmentation
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Training and test images; `mean` and `std` per channel of the training images on the scale 0 to 1.

    `augmentation` suits the kind of image (digits are not mirrored); `skipped` names each file left out and why.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    skipped: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Self:
        """Return the dataset with its images on `device`."""
        return type(self)(
            self.name,
            self.classes,
            self.train.to(device),
            self.test.to(device),
            self.mean,
            self.std,
            self.augmentation,
            self.skipped,
        )


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, C, H, W), on the scale 0 to 1, from histograms.

    A channel without any variation gets the deviation 1, so that normalising it gives zeros.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    frequency = torch.zeros(pixels.shape[1], 256, dtype=torch.float64)
    for part in pixels.split(1024):
        for channel in range(pixels.shape[1]):
            frequency[channel] += torch.bincount(part[:, channel].flatten(), minlength=256).cpu()
    frequency /= frequency.sum(1, keepdim=True)
    mean = frequency @ levels
    std = (frequency * (levels - mean[:, None]).square()).sum(1).sqrt()
    std[std < 1e-6] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def subset(images: Images, count: int, seed: int, what: str) -> Images:
    """Draw `count` images so that each class keeps its share; `what` names the setting in errors."""
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


def split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split into the rest and a held-out `fraction`, in which each class has its share."""
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
    """Positions, ascending, of a random draw with the classes' shares rounded by largest remainder."""
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
