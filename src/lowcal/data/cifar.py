"""CIFAR-10: torchvision's files, or a folder of image files."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowcal.data.cache import cache_folder
from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.data.folder import OnError, read_split_folders
from lowcal.errors import LowcalError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import CIFAR10

__all__ = ["fit_exact", "read_cifar10"]

SIZE = 32
BATCHES = "cifar-10-batches-py"


def read_cifar10(folder: Path | None, on_error: OnError, download: bool) -> Source:
    """Read CIFAR-10, (N, 3, 32, 32): 50,000 images to train on and 10,000 to test on.

    `folder` holds cifar-10-batches-py, or train/<class>/* and test/<class>/*. Without one, torchvision's files
    are read from the cache folder, to which they are downloaded (170 MB, checked by their MD5) if absent.
    """
    if folder is None:
        return _read_batches(cache_folder() / "cifar10", download)
    if (folder / BATCHES).is_dir():
        return _read_batches(folder, download=False)
    if folder.is_dir() and not (folder / "train").is_dir() and not (folder / "test").is_dir():
        raise LowcalError(
            f"{str(folder)!r} holds neither {BATCHES}/ nor train/ and test/: mend --data-dir, or leave it out to "
            "have CIFAR-10 downloaded"
        )
    return read_split_folders(folder, SIZE, on_error, fit_exact)


def fit_exact(image: "Image", size: int) -> "Image":
    """Return the image as it is; raises LowcalError if it is not size x size."""
    if image.size != (size, size):
        raise LowcalError(
            f"{image.size[0]}x{image.size[1]} pixels, where cifar10 has {size}x{size} (other sizes: "
            "--set data.name=image-folder --set data.image_size=...)"
        )
    return image


def _read_batches(root: Path, download: bool) -> Source:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise LowcalError("cifar10 in torchvision's form needs it: pip install 'lowcal[cli]'") from error
    try:
        train = CIFAR10(root, train=True, download=download)
        test = CIFAR10(root, train=False)
    except (OSError, RuntimeError) as error:  # no network, no room, or files that fail their MD5
        reason = str(error).partition("\n")[0]
        remedy = "check the network" if download else "remove the damaged files"
        raise LowcalError(
            f"cannot read CIFAR-10 from {str(root)!r}: {reason}; {remedy}, or give a folder with --data-dir"
        ) from error
    augmentation = Augmentation(pad=4, flip=True)
    return Source(tuple(train.classes), _images(train), _images(test), augmentation)


def _images(part: "CIFAR10") -> Images:
    pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(part.targets))
