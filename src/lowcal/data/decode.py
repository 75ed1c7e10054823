"""From an image file of any kind to 8-bit RGB pixels, with every failure named."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lowcal.errors import LowcalError

__all__ = ["decode_files", "read_rgb", "try_files", "warnings_as_needed"]

MAX_PIXELS = 89_478_485  # Pillow's own limit: a file over it is taken for a decompression bomb
DEEP = ("PNG", "PPM")  # formats whose 16 bits come as Pillow's 32-bit mode, PNG's in its older releases
CHUNK = 128  # files per task


def read_rgb(path: str, *, reduced: bool = False) -> Image.Image:
    """Read one file as 8-bit RGB: the first frame, upright by its EXIF tag, transparency over white.

    With `reduced` a JPEG comes at an eighth of its size, for which all its bytes are read in about half the time.

    Raises LowcalError with the reason, without the file's name, for whatever cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise LowcalError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
            if reduced:
                image.draft(image.mode, (1, 1))
            image.load()
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            return _to_rgb(upright, image.format)
    except LowcalError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise LowcalError(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        raise LowcalError("the file is empty" if empty else "not an image") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise LowcalError(reason) from error


def _to_rgb(image: Image.Image, image_format: str | None) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or (image.mode == "I" and image_format not in DEEP):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise LowcalError(f"{kind} pixels, whose scale is unknown: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def decode_files(
    paths: Sequence[str],
    size: int,
    fit: Callable[[Image.Image, int], Image.Image],
    on_failure: Callable[[str, str], None],
) -> tuple[Tensor, Tensor]:
    """Decode files into uint8 (N, 3, size, size), and a bool (N,) of those that could be read.

    `fit` brings an image to size x size. `on_failure(path, reason)` is called in the files' order, and may raise.
    """
    pixels = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8)
    rows: NDArray[Any] = pixels.numpy()

    def decode(index: int) -> None:
        rows[index] = np.asarray(fit(read_rgb(paths[index]), size)).transpose(2, 0, 1)

    read = torch.ones(len(paths), dtype=torch.bool)
    for index, reason in _failures(decode, len(paths)):
        read[index] = False
        on_failure(paths[index], reason)
    return pixels, read


def try_files(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Read each file, and name in their order those that cannot be read, with the reason."""
    for index, reason in _failures(lambda index: read_rgb(paths[index], reduced=True), len(paths)):
        yield paths[index], reason


def _failures(work: Callable[[int], object], count: int) -> Iterator[tuple[int, str]]:
    """Call `work` with 0 to `count` - 1, in threads, and give in order those that raise LowcalError, and why."""

    def work_through(start: int) -> list[tuple[int, str]]:
        failures = []
        for index in range(start, min(start + CHUNK, count)):
            try:
                work(index)
            except LowcalError as error:
                failures.append((index, str(error)))
        return failures

    with warnings_as_needed(), ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for failures in pool.map(work_through, range(0, count, CHUNK)):
                yield from failures
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def warnings_as_needed() -> Iterator[None]:
    """Make Pillow's bomb warning an error and keep its remarks on odd metadata silent; holds for all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
