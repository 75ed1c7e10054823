"""Folders of image files, one folder per class: train/<class>/* and test/<class>/* (or val/)."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lowcal.data.cache import read_cache, write_cache
from lowcal.data.dataset import Augmentation, Images, Source
from lowcal.errors import LowcalError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["OnError", "fit_cropped", "read_image_folder", "read_split_folders"]

OnError = Literal["stop", "skip"]


class Fit(Protocol):
    """A named function that brings an image to size x size; its name tells apart what is cached."""

    __name__: str

    def __call__(self, image: "Image", size: int, /) -> "Image": ...


NAMED = 5  # how many names an error lists


@dataclass(frozen=True)
class Listing:
    """The files of one split, class by class in the order of the classes' names; `files` are below `folder`."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


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
    if not folder.is_dir():
        raise LowcalError(f"no data folder {str(folder)!r}: give an existing one with --data-dir")
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or held_out is None:
        found = _some(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise LowcalError(f"{str(folder)!r} must hold train/ and test/ (or val/); it holds {found}")
    train, test = _list(folder / "train"), _list(folder / held_out)
    if train.classes != test.classes:
        only_train = _some(sorted(set(train.classes) - set(test.classes)))
        only_test = _some(sorted(set(test.classes) - set(train.classes)))
        parts = [f"only in train/: {only_train}"] * bool(only_train)
        parts += [f"only in {held_out}/: {only_test}"] * bool(only_test)
        raise LowcalError(f"class folders of {str(folder)!r} differ: {'; '.join(parts)}; make them alike")
    _check_memory(len(train.files) + len(test.files), size, folder)
    train_images, train_skipped = _read(train, size, on_error, fit)
    test_images, test_skipped = _read(test, size, on_error, fit)
    augmentation = Augmentation(pad=size // 8, flip=True)
    return Source(train.classes, train_images, test_images, augmentation, train_skipped + test_skipped)


def _list(folder: Path) -> Listing:
    try:
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        by_class = {name: _files(folder, name) for name in classes}
    except OSError as error:
        raise LowcalError(f"cannot read {str(error.filename)!r}: {error.strerror}") from error
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise LowcalError(f"{str(folder)!r} must hold a folder for each of two or more classes; found {found}")
    if empty := [name for name, files in by_class.items() if not files]:
        raise LowcalError(f"class folders without a file in {str(folder)!r}: {_some(empty)}; fill or remove them")
    files = [(file, label) for label, name in enumerate(classes) for file in by_class[name]]
    return Listing(folder, tuple(classes), tuple(file for file, _ in files), tuple(label for _, label in files))


def _files(folder: Path, name: str) -> list[str]:
    """Return the files of one class, nested folders included; strings, as paths are slow by the ten thousand."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, names in os.walk(folder / name, onerror=fail):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        below = os.path.relpath(parent, folder)
        found += [f"{below}/{file}" for file in names if not file.startswith(".")]
    return sorted(found)


def _read(listing: Listing, size: int, on_error: OnError, fit: Fit) -> tuple[Images, tuple[str, ...]]:
    """Return one split's images, from the cache if its files have not changed, and the files left out."""
    place, key = f"{listing.folder.resolve()} {fit.__name__} {size}", _key(listing)
    content = read_cache(place, key)
    if content is None:
        content = _decode(listing, size, on_error, fit)
        write_cache(place, key, content)
    skipped = tuple(f"{listing.folder / name}: {reason}" for name, reason in content["skipped"])
    if skipped and on_error == "stop":
        raise _unreadable(skipped[0])
    images = Images(content["pixels"], content["labels"])
    counts = torch.bincount(images.labels, minlength=len(listing.classes)).tolist()
    if lost := [name for name, count in zip(listing.classes, counts, strict=True) if count == 0]:
        raise LowcalError(f"class folders of {str(listing.folder)!r} without one readable image: {_some(lost)}")
    return images, skipped


def _decode(listing: Listing, size: int, on_error: OnError, fit: Fit) -> dict[str, Any]:
    try:
        from lowcal.data.decode import decode_files
    except ImportError as error:
        raise LowcalError("image folders need Pillow and NumPy: pip install 'lowcal[cli]'") from error
    skipped: list[tuple[str, str]] = []

    def on_failure(path: str, reason: str) -> None:
        if on_error == "stop":
            raise _unreadable(f"{path}: {reason}")
        skipped.append((os.path.relpath(path, listing.folder), reason))

    paths = [f"{listing.folder}/{file}" for file in listing.files]
    pixels, read = decode_files(paths, size, fit, on_failure)
    labels = torch.tensor(listing.labels)
    if skipped:
        pixels, labels = pixels[read], labels[read]
    return {"pixels": pixels, "labels": labels, "skipped": skipped}


def _unreadable(file_and_reason: str) -> LowcalError:
    return LowcalError(
        f"cannot read image {file_and_reason}; mend or remove it, or leave such files out with --set data.on_error=skip"
    )


def _key(listing: Listing) -> str:
    """Return what changes when a file is added, removed, renamed or written, or the decoder changes."""
    from PIL import __version__

    digest = hashlib.sha256(__version__.encode())
    for file in listing.files:
        try:
            status = os.stat(f"{listing.folder}/{file}")
            state = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            state = "\0unreadable\n"  # a broken link, say: decoding it will tell
        digest.update(os.fsencode(file) + state.encode())
    return digest.hexdigest()


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
