"""Image files that are unusual, and are used, or unusable, and are named or left out."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lowcal import LowcalError
from lowcal.data import load, make_loader

from .runs import Tally

SIDE = 32
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """A kind of image file.

    Attributes:
        suffix: of its name.
        write: makes one at a path.
        colour: what each of its pixels is; None if it cannot be used.
        reason: what is said then.
        is_square: whether it has `SIDE` x `SIDE` pixels.
    """

    suffix: str
    write: Callable[[Path], Any]
    colour: Colour | None = None
    reason: str = ""
    is_square: bool = True


def _flat(colour: Colour, width: int = SIDE, height: int | None = None) -> Image.Image:
    return Image.new("RGB", (width, height or width), colour)


def _grey(levels: Any) -> Image.Image:
    return Image.fromarray(np.full((SIDE, SIDE), levels))


def _animated(path: Path) -> None:
    _flat((255, 0, 0)).save(path, save_all=True, append_images=[_flat((0, 0, 255)), _flat((0, 255, 0))])


def _deep_colour(path: Path) -> None:
    """A PNG with 16 bits per channel."""
    pixels = np.broadcast_to(np.array([0x8000, 0x01FF, 0xFFFF], dtype=">u2"), (SIDE, SIDE, 3))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    _png(path, SIDE, 16, 2, rows)


def _bomb(path: Path) -> None:
    """A whole PNG of 30 kB that would take half a gigabyte in memory."""
    side = 14_000
    _png(path, side, 1, 0, bytes(side * (1 + -(-side // 8))))


def _png(path: Path, side: int, depth: int, colours: int, rows: bytes) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def _cut(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


KINDS = {
    "CMYK": Kind("jpg", lambda path: Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)).save(path), (254, 0, 0)),
    "16-bit grey PNG": Kind("png", lambda path: _grey(np.uint16(0x80FF)).save(path), (128, 128, 128)),
    "16-bit grey PNG, dark": Kind("png", lambda path: _grey(np.uint16(0x00FF)).save(path), (0, 0, 0)),
    "16-bit grey TIFF": Kind("tif", lambda path: _grey(np.uint16(0x4000)).save(path), (64, 64, 64)),
    "16-bit colour PNG": Kind("png", _deep_colour, (128, 1, 255)),
    "animated GIF": Kind("gif", _animated, (255, 0, 0)),
    "animated PNG": Kind("png", _animated, (255, 0, 0)),
    "1x1": Kind("png", lambda path: _flat((9, 99, 199), 1).save(path), (9, 99, 199), is_square=False),
    "strip of 1x1,000,000": Kind(
        "png", lambda path: _flat((9, 99, 199), 1, 10**6).save(path), (9, 99, 199), is_square=False
    ),
    "truncated JPEG": Kind("jpg", _cut, reason="truncated"),
    "truncated PNG": Kind("png", _cut, reason="truncated"),
    "zero bytes": Kind("jpg", lambda path: path.touch(), reason="the file is empty"),
    "no image": Kind("jpg", lambda path: path.write_text("dear diary"), reason="not an image"),
    "huge dimensions": Kind("png", _bomb, reason="more than 89,478,485 pixels"),
    "floating-point TIFF": Kind("tif", lambda path: _grey(np.float32(0.5)).save(path), reason="floating-point pixels"),
    "32-bit TIFF": Kind("tif", lambda path: _grey(np.int32(7)).save(path), reason="32-bit pixels"),
}
LOADERS: dict[str, dict[str, Any]] = {
    "image-folder": {"image_size": SIDE},
    "cifar10": {},
    "imagenet": {"image_size": SIDE, "classes": 2, "workers": 0},
    "imagenet, 2 workers": {"image_size": SIDE, "classes": 2, "workers": 2},
}


def check(folder: Path, loader: str, kind: Kind) -> None:
    """Trains on a pass over good files and one of that kind in each split, new in `folder`.

    Raises:
        AssertionError: it was neither used as what it shows, nor named in one line, nor left out where that is asked.
    """
    name = loader.partition(",")[0]
    classes = "abcdefghij" if name == "cifar10" else "ab"
    files = [_write(folder / split, kind, classes) for split in ("train", "val" if name == "imagenet" else "test")]
    reason = kind.reason
    if name == "cifar10" and not kind.is_square:
        reason = "where CIFAR has 32x32"

    def read(on_error: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pixels, on the scale 0 to 255, and labels of training, then of evaluation."""
        data = load(name, data_dir=folder, on_error=on_error, **LOADERS[loader])
        expected = [f"{file}: " for file in files] if reason and on_error == "skip" else []
        assert len(data.skipped) == len(expected), data.skipped
        assert all(map(str.startswith, data.skipped, expected)), data.skipped
        scale = [torch.tensor(values).view(3, 1, 1) for values in (data.std, data.mean)]
        passes = []
        for training in (True, False):
            batches = list(make_loader(data, training=training, batch=1, device="cpu"))
            images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            passes.append(((images * scale[0] + scale[1]) * 255, labels))
        return passes

    if not reason:
        for images, labels in read("stop"):
            assert labels.bincount().tolist() == [2, 3, *[2] * (len(classes) - 2)]
            # Augmentation of images in memory puts black around some of them.
            colours = images[labels == 1].amax(dim=(2, 3))
            distance = (colours - torch.tensor(kind.colour)).abs().amax(dim=1)
            assert distance.min() <= 1.5, (colours, kind.colour)
        return
    message = ""
    try:
        read("stop")
    except LowcalError as error:
        message = str(error)
    assert message, "it was used"
    assert any(str(file) in message for file in files), message
    assert reason in message, message
    assert "\n" not in message, message
    for images, labels in read("skip"):
        assert labels.bincount().tolist() == [2] * len(classes)
        assert images.isfinite().all()


def trials(folder: Path) -> list[Tally]:
    """A row for each kind of file, tried with each loader."""
    rows = []
    for number, (name, kind) in enumerate(KINDS.items()):
        end = "used" if kind.colour is not None else "named in one line, or left out and counted"
        if not kind.is_square:
            end = "used, or as a CIFAR image named or left out"
        row = Tally(f"image file: {name}", f"in training and evaluation; {end}")
        for loader in LOADERS:
            try:
                check(folder / f"{number}-{loader.replace(' ', '')}", loader, kind)
            except AssertionError as error:
                print(f"{name}, {loader}: {error}")
                row.note(False)
            else:
                row.note(True)
        rows.append(row)
    return rows


def _write(split: Path, kind: Kind, labels: str) -> Path:
    """Classes of two dark images each, and in the second one of that kind."""
    for label in labels:
        (split / label).mkdir(parents=True)
        for index in range(2):
            _flat((index, 3, 5)).save(split / label / f"{index}.png")
    odd = split / "b" / f"odd.{kind.suffix}"
    kind.write(odd)
    return odd
