"""Folders of image files decoded into memory: train/<class>/* and test/<class>/* (or val/)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowcal.data.cache import read_cache, write_cache
from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.data.listing import Listing, OnError, list_splits, require_every_class, unreadable
from lowcal.errors import LowcalError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["fit_cropped", "read_image_folder", "read_split_folders"]


class Fit(Protocol):
    """A named function that brings an image to size x size; its name tells apart what is cached."""

    __name__: str

    def __call__(self, image: "Image", size: int, /) -> "Image": ...


def read_image_folder(folder: Path, image_size: int, on_error: OnError) -> Source:
    """Read a folder with train/ and test/ (or val/), each image brought to image_size x image_size.

    The shorter side is scaled to the size and the middle is kept.
    """
    return read_split_folders(folder, image_size, on_error, fit_cropped)


def fit_cropped(image: "Image", size: int) -> "Image":
    """Keep the largest square in the middle, scaled to size x size with antialiasing."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)


def read_split_folders(folder: Path, size: int, on_error: OnError, fit: Fit) -> Source:
    """Read train/ and test/ (or val/) below `folder`; `fit` brings an image to size x size."""
    train, test = list_splits(folder, ("test", "val"))
    _check_memory(len(train.files) + len(test.files), size, folder)
    train_images, train_skipped = _read(train, size, on_error, fit)
    test_images, test_skipped = _read(test, size, on_error, fit)
    augmentation = Augmentation(pad=size // 8, flip=True)
    return Source(train.classes, train_images, test_images, augmentation, train_skipped + test_skipped)


def _read(listing: Listing, size: int, on_error: OnError, fit: Fit) -> tuple[Images, tuple[str, ...]]:
    """Return one split's images, from the cache if its files have not changed, and the files left out."""
    place, key = f"{listing.folder.resolve()} {fit.__name__} {size}", listing.key()
    content = read_cache(place, key)
    if content is None or not _fits(content, listing, size):
        content = _decode(listing, size, on_error, fit)
        write_cache(place, key, content)
    skipped = tuple(f"{listing.folder / name}: {reason}" for name, reason in content["skipped"])
    if skipped and on_error == "stop":
        raise unreadable(skipped[0])
    images = Images(content["pixels"], content["labels"])
    require_every_class(listing, images.labels)
    return images, listing.passed_over + skipped


def _fits(content: Any, listing: Listing, size: int) -> bool:
    """Whether what the cache holds can be the images of `listing`."""
    try:
        pixels, labels, skipped = (content[name] for name in ("pixels", "labels", "skipped"))
        names = [name for name, _ in skipped]
        count = len(listing.files) - len(names)
        kinds = (pixels.shape, pixels.dtype, labels.shape, labels.dtype)
        return kinds == ((count, 3, size, size), torch.uint8, (count,), torch.int64)
    except Exception:  # it may be of any form
        return False


def _decode(listing: Listing, size: int, on_error: OnError, fit: Fit) -> dict[str, Any]:
    try:
        from lowcal.data.decode import decode_files
    except ImportError as error:
        raise LowcalError("image folders need Pillow and NumPy: pip install 'lowcal[cli]'") from error
    skipped: list[tuple[str, str]] = []

    def on_failure(path: str, reason: str) -> None:
        if on_error == "stop":
            raise unreadable(f"{path}: {reason}")
        skipped.append((os.path.relpath(path, listing.folder), reason))

    pixels, read = decode_files(listing.paths, size, fit, on_failure)
    labels = torch.tensor(listing.labels)
    if skipped:
        pixels, labels = pixels[read], labels[read]
    return {"pixels": pixels, "labels": labels, "skipped": skipped}


def _check_memory(images: int, size: int, folder: Path) -> None:
    needed = images * 3 * size * size
    if not hasattr(os, "sysconf"):
        return
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * present:
        raise LowcalError(
            f"{images:,} images of {size}x{size} in {str(folder)!r} take {needed / 2**30:.1f} GiB, and this "
            f"machine has {present / 2**30:.1f} GiB of memory: set a smaller data.image_size"
        )
