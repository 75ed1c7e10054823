"""Images made from a seed, for timing and for tests: a smooth random pattern per class, under noise."""

import torch
from torch.nn.functional import interpolate

from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.errors import LowcalError

__all__ = ["make_synthetic"]

NOISE = 48.0  # standard deviation of the noise, in grey levels; the patterns' is 64


def make_synthetic(*, classes: int, image_size: int, train: int, test: int, seed: int) -> Source:
    """Make `train` and `test` colour images, (N, 3, image_size, image_size), of equally frequent classes."""
    for what, count in (("train_images", train), ("test_images", test)):
        if count < classes:
            raise LowcalError(f"data.{what} is {count}, fewer than the {classes} classes: set it to at least {classes}")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, 3, 4, 4, generator=generator)
    patterns = interpolate(coarse, size=(image_size, image_size), mode="bilinear") * 64 + 128

    def draw(count: int) -> Images:
        labels = torch.arange(count) % classes
        pixels = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
        for part, label in zip(pixels.split(1024), labels.split(1024), strict=True):
            noisy = patterns[label] + NOISE * torch.randn(part.shape, generator=generator)
            part.copy_(noisy.clamp(0, 255).round())
        return Images(pixels, labels)

    names = tuple(f"class {label}" for label in range(classes))
    return Source(names, draw(train), draw(test), Augmentation(pad=image_size // 8, flip=True))
