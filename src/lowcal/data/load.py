"""Datasets by name."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from lowcal.data.batches import Batches
from lowcal.data.cifar import CIFAR, read_cifar
from lowcal.data.dataset import Dataset, Images, Source, split, subset
from lowcal.data.digits import read_digits
from lowcal.data.file_batches import FileBatches
from lowcal.data.folder import read_image_folder
from lowcal.data.imagenet import read_imagenet
from lowcal.data.listing import OnError, class_folders
from lowcal.data.loader import Loader, Shard
from lowcal.data.synthetic import make_synthetic
from lowcal.errors import LowcalError, nearest

__all__ = ["CLASSES", "DATASETS", "IMAGES", "load", "make_loader"]

DATASETS = ("cifar10", "cifar100", "digits", "image-folder", "imagenet", "synthetic")
FOLDERS = (*CIFAR, "image-folder", "imagenet")
# Of the published data sets: their classes, and their training and test images.
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
IMAGES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    train_images: int | None = None,
    test_images: int | None = None,
    image_size: int | None = None,
    classes: int | None = None,
    evaluate: Literal["test", "validation"] = "test",
    validation_fraction: float = 0.2,
    on_error: OnError = "stop",
    download: bool = True,
    workers: int | None = None,
) -> Dataset:
    """Load a dataset, into memory except for imagenet; the same arguments give the same images in the same order.

    `data_dir` is for cifar10, cifar100, image-folder and imagenet, `image_size` (pixels) for image-folder, imagenet
    (default 224) and synthetic (default 32), `classes` for synthetic (default 10) and as the number that must be found
    for imagenet (default 1000) and image-folder (default: any), `workers` (processes that decode; default: one per
    processor, at most 16) for imagenet. With `evaluate="validation"` a stratified
    `validation_fraction` of the training images takes the test images' place, so that settings can be chosen without
    looking at those.
    `train_images` and `test_images` then draw stratified subsets; `seed` decides both, and what synthetic makes.
    `on_error="skip"` leaves out unreadable files and names them in `Dataset.skipped`.

    Raises LowcalError for an unknown name, a setting that the dataset does not have, a folder with another number of
    classes, or unusable data.
    """
    if name not in DATASETS:
        raise LowcalError(f"unknown data {name!r}{nearest(name, DATASETS)}")
    _check_settings(name, data_dir, image_size, classes, workers)
    for what, value in (("train_images", train_images), ("test_images", test_images)):
        if value is not None and value < 1:
            raise LowcalError(f"data.{what} is {value}, but must be at least 1")
    if name == "synthetic":
        source = make_synthetic(
            classes=classes or 10, image_size=image_size or 32,
            train=train_images or 2048, test=test_images or 512, seed=seed,
        )  # fmt: skip
    else:
        _check_classes(name, data_dir, classes)
        source = _read(name, data_dir, image_size, on_error, download, workers)
    train, test = source.train, source.test
    whole = IMAGES.get(name, (len(train), len(test)))
    if evaluate == "validation":
        train, test = split(train, validation_fraction, seed)
        if name == "synthetic":  # made in the numbers asked for, so there is nothing left to draw
            train_images = test_images = None
    if train_images is not None:
        train = subset(train, train_images, seed, "data.train_images")
    if test_images is not None:
        test = subset(test, test_images, seed, "data.test_images")
    mean, std = train.statistics()
    folder = data_dir.resolve().name if data_dir is not None and name == "image-folder" else None
    return Dataset(name, source.classes, train, test, mean, std, source.augmentation, source.skipped, whole, folder)


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
    """The loader of the training images, in a new order and augmented in each pass, or of the test images as they are.

    Images in memory go to the device once, files are decoded ahead of their use. `seed` decides order and augmentation.
    `batch` is over all processes, of which this one is given its `shard`.
    """
    images = data.train if training else data.test
    if isinstance(images, Images):
        return Batches(
            images, batch=batch, mean=data.mean, std=data.std, device=device, seed=seed, shuffle=training,
            augmentation=data.augmentation if training else None, channels_last=channels_last, shard=shard,
        )  # fmt: skip
    return FileBatches(
        images, batch=batch, mean=data.mean, std=data.std, device=device, seed=seed, shuffle=training,
        augment=training, channels_last=channels_last, shard=shard,
    )  # fmt: skip


def _check_settings(
    name: str, data_dir: Path | None, image_size: int | None, classes: int | None, workers: int | None
) -> None:
    if data_dir is not None and name not in FOLDERS:
        raise LowcalError(f"data {name!r} reads no folder: leave out --data-dir (found {str(data_dir)!r})")
    if image_size is not None and name not in ("image-folder", "imagenet", "synthetic"):
        raise LowcalError(f"data {name!r} has no settable image size: leave out data.image_size ({image_size})")
    if image_size is not None and image_size < 1:
        raise LowcalError(f"data.image_size is {image_size}, but must be at least 1")
    if classes is not None and name not in ("synthetic", "image-folder", "imagenet"):
        raise LowcalError(f"data {name!r} brings its own classes: leave out data.classes (found {classes})")
    if classes is not None and classes < 2:
        raise LowcalError(f"data.classes is {classes}, but must be at least 2")
    if workers is not None and name != "imagenet":
        raise LowcalError(f"data {name!r} is held in memory and needs no workers: leave out data.workers ({workers})")
    if workers is not None and workers < 0:
        raise LowcalError(f"data.workers is {workers}, but must be at least 0 (decode in the main process)")


def _check_classes(name: str, folder: Path | None, classes: int | None) -> None:
    """Refuse a folder that holds another number of classes than the dataset has, before any image is decoded."""
    wanted = classes or CLASSES.get(name)
    if folder is None or wanted is None:
        return
    own = CIFAR[name].batches if name in CIFAR else None
    other = next((other for other, form in CIFAR.items() if other != name and (folder / form.batches).is_dir()), None)
    if own and other and not (folder / own).is_dir():
        raise LowcalError(
            f"{str(folder)!r} holds {CIFAR[other].title}, but this recipe's data is {name!r}: "
            f"give another --data-dir, or --set data.name={other}"
        )
    found = wanted
    if own is None or not (folder / own).is_dir():
        with suppress(OSError):  # the reader says what is wrong with the folder
            found = len(class_folders(folder / "train"))
    if found == wanted or found < 2:  # the reader refuses those
        return
    fitting = next((other for other in CIFAR if own and CLASSES[other] == found), None)
    remedy = f"--set data.classes={found}"
    if own:
        remedy = f"--set data.name={fitting}" if fitting else "--set data.name=image-folder --set data.image_size=32"
    has = f"data.classes is {wanted}" if classes else f"data {name!r} has {wanted}"
    raise LowcalError(
        f"{str(folder)!r} holds {found} class folders, but {has}: give another --data-dir, or "
        f"train on this one with {remedy}"
    )


def _read(
    name: str, data_dir: Path | None, image_size: int | None, on_error: OnError, download: bool, workers: int | None
) -> Source:
    if name == "digits":
        return read_digits()
    if name in CIFAR:
        return read_cifar(name, data_dir, on_error, download)
    if name == "imagenet":
        if data_dir is None:
            raise LowcalError("data 'imagenet' needs a folder with train/ and val/: give it with --data-dir")
        return read_imagenet(data_dir, image_size, on_error, workers)
    if data_dir is None:
        raise LowcalError("data 'image-folder' needs a folder with train/ and test/: give it with --data-dir")
    if image_size is None:
        raise LowcalError("data 'image-folder' needs the images' side: --set data.image_size=64, say")
    return read_image_folder(data_dir, image_size, on_error)
