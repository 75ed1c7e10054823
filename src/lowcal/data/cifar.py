"""CIFAR-10 and CIFAR-100: torchvision's files, or a folder of image files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowcal.data.cache import cache_folder
from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.data.folder import read_split_folders
from lowcal.data.listing import OnError
from lowcal.errors import LowcalError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import CIFAR10

__all__ = ["CIFAR", "fit_exact", "read_cifar"]

SIZE = 32


@dataclass(frozen=True)
class Form:
    """One of the two sets: its name for people, torchvision's class for it, and the folder of that class's files."""

    title: str
    reader: str
    batches: str


CIFAR = {
    "cifar10": Form("CIFAR-10", "CIFAR10", "cifar-10-batches-py"),
    "cifar100": Form("CIFAR-100", "CIFAR100", "cifar-100-python"),
}


def read_cifar(name: str, folder: Path | None, on_error: OnError, download: bool) -> Source:
    """Read `cifar10` or `cifar100` (the fine classes), (N, 3, 32, 32): 50,000 images to train on, 10,000 to test on.

    `folder` holds cifar-10-batches-py or cifar-100-python, or train/<class>/* and test/<class>/*. Without one,
    torchvision's files are read from the cache folder, to which they are downloaded (170 MB, checked by their MD5) if
    absent.
    """
    form = CIFAR[name]
    if folder is None:
        remedy = "check the network" if download else "set data.download=true"
        return _read_batches(form, cache_folder() / name, download, f"{remedy}, or give a folder with --data-dir")
    if (folder / form.batches).is_dir():
        return _read_batches(form, folder, False, "replace it, or leave out --data-dir to have whole files downloaded")
    if folder.is_dir() and not (folder / "train").is_dir() and not (folder / "test").is_dir():
        raise LowcalError(
            f"{str(folder)!r} holds neither {form.batches}/ nor train/ and test/: mend --data-dir, or leave it out to "
            f"have {form.title} downloaded"
        )
    return read_split_folders(folder, SIZE, on_error, fit_exact)


def fit_exact(image: "Image", size: int) -> "Image":
    """Return the image as it is; raises LowcalError if it is not size x size."""
    if image.size != (size, size):
        raise LowcalError(
            f"{image.size[0]}x{image.size[1]} pixels, where CIFAR has {size}x{size} (other sizes: "
            "--set data.name=image-folder --set data.image_size=...)"
        )
    return image


def _read_batches(form: Form, root: Path, download: bool, remedy: str) -> Source:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise LowcalError(f"{form.title} in torchvision's form needs it: pip install 'lowcal[cli]'") from error
    reader = getattr(datasets, form.reader)
    try:
        train = reader(root, train=True, download=download)
        test = reader(root, train=False)
    except (OSError, RuntimeError) as error:  # no network, no room, or files that fail their checksum
        found = None if download else _faulty(reader, root)
        reason = found or str(error).partition("\n")[0]
        raise LowcalError(f"cannot read {form.title} from {str(root)!r}: {reason}; {remedy}") from error
    augmentation = Augmentation(pad=4, flip=True)
    return Source(tuple(train.classes), _images(train), _images(test), augmentation)


def _faulty(reader: Any, root: Path) -> str | None:
    """The first file that is absent or fails its checksum, and how; None if all are whole."""
    from torchvision.datasets.utils import check_integrity

    for file, md5 in (*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])):
        path = root / reader.base_folder / file
        if not path.is_file():
            return f"{reader.base_folder}/{file} is not there"
        if not check_integrity(path, md5):
            return f"{reader.base_folder}/{file} is damaged: its MD5 checksum is not {md5}"
    return None


def _images(part: "CIFAR10") -> Images:
    pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(part.targets))
