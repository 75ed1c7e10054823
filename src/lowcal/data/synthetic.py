"""Images made from a seed, for timing and for tests: a smooth random pattern per class, under noise."""

import torch
from torch.nn.functional import interpolate

from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.errors import LowcalError

__all__ = ["make_synthetic"]

NOISE = 48.0  # standard deviation of the noise, in grey levels; the patterns' is 64
POOL = 2**28  # bytes of different images in a split; more images than fit share their pixels


def make_synthetic(*, classes: int, image_size: int, train: int, test: int, seed: int) -> Source:
    """Make `train` and `test` colour images, 3 x image_size x image_size, of equally frequent classes.

    Any number can be had: what would take over 256 MiB repeats its images, at least one for each class.
    """
    for what, count in (("train_images", train), ("test_images", test)):
        if count < classes:
            raise LowcalError(f"data.{what} is {count}, fewer than the {classes} classes: set it to at least {classes}")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, 3, 4, 4, generator=generator)
    bytes_each = 3 * image_size**2
    most = max(1, POOL // bytes_each // classes) * classes
    at_once = max(1, min(1024, POOL // bytes_each // 8))

    def draw(count: int) -> Images:
        labels = torch.arange(count) % classes
        different = min(count, most)
        pixels = torch.empty(different, 3, image_size, image_size, dtype=torch.uint8)
        for part, label in zip(pixels.split(at_once), labels[:different].split(at_once), strict=True):
            patterns = interpolate(coarse[label], size=(image_size, image_size), mode="bilinear") * 64 + 128
            part.copy_((patterns + NOISE * torch.randn(part.shape, generator=generator)).clamp(0, 255).round())
        return Images(pixels, labels, torch.arange(count) % different if different < count else None)

    names = tuple(f"class {label}" for label in range(classes))
    return Source(names, draw(train), draw(test), Augmentation(pad=image_size // 8, flip=True))
