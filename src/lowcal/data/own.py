"""Images of a person's own, from a function in a file: checked, and read into memory."""

from operator import index
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.data.images import to_rgb
from lowcal.errors import LowcalError
from lowcal.user_files import call

GREY = ("1", "L")  # Pillow's modes of grey images with 8 bits or fewer


def read_own(name: str) -> Source:
    """Return what the function `name` (`FILE.py:FUNCTION`) loads, once, without arguments.

    It returns the training and the test images. Each is a map-style dataset of pairs (image, label), the image a Pillow
    image or a uint8 tensor (C, H, W), or a pair of tensors: images uint8 (N, C, H, W) and labels (N,), whole numbers
    from 0 on. The names of the classes are the attribute `classes` of the training images, if they have it.

    Raises:
        LowcalError: the function fails, or returns something else.
    """
    parts = call(name)
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise LowcalError(f"{name} returned {_kind(parts)}; it must return (train, test)")
    train, test = _images(parts[0], f"{name}, training images"), _images(parts[1], f"{name}, test images")
    if train.shape != test.shape:
        sizes = f"training images are {_size(train.shape)}, test images {_size(test.shape)}"
        raise LowcalError(f"{name}: {sizes}; bring them to one size")
    present, highest = set(train.labels.tolist()), int(torch.cat([train.labels, test.labels]).max())
    absent = next((label for label in range(max(highest, 1) + 1) if label not in present), None)
    if absent is not None:
        raise LowcalError(
            f"{name}: no training image has the label {absent}, and the highest label is {highest}; labels must be "
            "0, 1, 2 ..., each with training images"
        )
    named = getattr(parts[0], "classes", None)
    is_named = (
        isinstance(named, tuple | list) and len(named) == len(present) and len(set(map(str, named))) == len(named)
    )
    classes = tuple(map(str, named)) if is_named else tuple(map(str, range(len(present))))  # type: ignore[arg-type]
    return Source(classes, train, test, Augmentation(pad=min(train.shape[1:]) // 8, flip=True))


def _images(part: Any, what: str) -> Images:
    if isinstance(part, tuple) and len(part) == 2 and all(isinstance(one, Tensor) for one in part):
        pixels, labels = part
    elif hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        if not len(part):
            raise LowcalError(f"{what}: there are none; give at least one for each class")
        pixels, labels = _read(part, what)
    else:
        raise LowcalError(
            f"{what}: found {_kind(part)}; give a dataset with __len__ and __getitem__, or (images, labels) as tensors"
        )
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise LowcalError(
            f"{what}: the tensor is {str(pixels.dtype).removeprefix('torch.')} of shape {tuple(pixels.shape)}; "
            "give uint8 (N, C, H, W), 0 to 255: lowcal normalises"
        )
    if labels.is_floating_point() or labels.shape != (len(pixels),) or not len(labels) or int(labels.min()) < 0:
        raise LowcalError(f"{what}: the labels must be {len(pixels)} whole numbers from 0 on, one for each image")
    return Images(pixels.contiguous(), labels.long())


def _read(part: Any, what: str) -> tuple[Tensor, Tensor]:
    """Read all pairs of a map-style dataset, in order."""
    pixels, labels = torch.empty(0), torch.empty(len(part), dtype=torch.int64)
    for number in range(len(part)):
        try:
            image, label = part[number]
            labels[number] = index(label)
            image = _pixels(image)
        except Exception as error:  # a person's code raises what it likes
            reason = error if isinstance(error, LowcalError) else f"{type(error).__name__}: {error}".partition("\n")[0]
            raise LowcalError(f"{what}: item {number} is no pair of an image and a label ({reason})") from error
        if number == 0:
            pixels = torch.empty(len(part), *image.shape, dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            sizes = f"{_size(image.shape)}, the first {_size(pixels.shape[1:])}"
            raise LowcalError(f"{what}: image {number} is {sizes}; bring them to one size")
        pixels[number] = image
    return pixels, labels


def _pixels(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        array = np.array(image.convert("L") if image.mode in GREY else to_rgb(image, image.format))
        return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        return image
    found = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else _kind(image)
    raise LowcalError(f"the image is {found}, not a Pillow image or a uint8 tensor (C, H, W); leave transforms out")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _size(shape: Any) -> str:
    return "x".join(map(str, shape))
