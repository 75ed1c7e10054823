"""Image files below train/ and test/, one folder per class: their names, and what is wrong with them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowcal.errors import LowcalError

__all__ = ["Listing", "OnError", "class_folders", "list_splits", "require_every_class", "unreadable"]

OnError = Literal["stop", "skip"]

NAMED = 5  # how many names an error lists
# Those of torchvision's ImageFolder, and further ones of formats that Pillow reads.
ENDINGS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jpe", ".jp2", ".apng", ".pbm", ".pnm", ".tga", ".avif",
)  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The files of one split, class by class in the order of the classes' names; `files` are below `folder`.

    `passed_over` are the files whose ending is not one of images, each with the reason.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    passed_over: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """The files with their folder; strings, as Path objects are slow by the ten thousand."""
        return [f"{self.folder}/{file}" for file in self.files]

    def key(self) -> str:
        """Return what changes when a file is added, removed, renamed or written, or the decoder changes."""
        from PIL import __version__

        digest = hashlib.sha256(__version__.encode())
        for file in self.files:
            try:
                status = os.stat(f"{self.folder}/{file}")
                state = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
            except OSError:
                state = "\0unreadable\n"  # a broken link, say: decoding it will tell
            digest.update(os.fsencode(file) + state.encode())
        return digest.hexdigest()


def list_splits(folder: Path, held_out: Sequence[str]) -> tuple[Listing, Listing]:
    """List train/ and the first of the folders `held_out` that is there; both have the same two or more classes."""
    if not folder.is_dir():
        raise LowcalError(f"no data folder {str(folder)!r}: give an existing one with --data-dir")
    other = next((name for name in held_out if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or other is None:
        found = _some(sorted(p.name for p in folder.iterdir())) or "nothing"
        wanted = f"{held_out[0]}/" + "".join(f" (or {name}/)" for name in held_out[1:])
        raise LowcalError(f"{str(folder)!r} must hold train/ and {wanted}; it holds {found}")
    train, test = _list(folder / "train"), _list(folder / other)
    if train.classes != test.classes:
        only_train = _some(sorted(set(train.classes) - set(test.classes)))
        only_test = _some(sorted(set(test.classes) - set(train.classes)))
        parts = [f"only in train/: {only_train}"] * bool(only_train)
        parts += [f"only in {other}/: {only_test}"] * bool(only_test)
        raise LowcalError(f"class folders of {str(folder)!r} differ: {'; '.join(parts)}; make them alike")
    return train, test


def class_folders(folder: Path) -> list[str]:
    """The names of the classes below one split's folder, in their order; OSError if it cannot be read."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def require_every_class(listing: Listing, labels: Tensor) -> None:
    """Refuse a split whose readable images, `labels` int64 (N,), are not of all its classes."""
    counts = torch.bincount(labels, minlength=len(listing.classes)).tolist()
    if lost := [name for name, count in zip(listing.classes, counts, strict=True) if count == 0]:
        raise LowcalError(f"class folders of {str(listing.folder)!r} without one readable image: {_some(lost)}")


def unreadable(file_and_reason: str) -> LowcalError:
    """The error for a file that cannot be read, where that is to stop everything."""
    return LowcalError(
        f"cannot read image {file_and_reason}; mend or remove it, or leave such files out with --set data.on_error=skip"
    )


def _list(folder: Path) -> Listing:
    try:
        classes = class_folders(folder)
        by_class = {name: _files(folder, name) for name in classes}
    except OSError as error:
        raise LowcalError(f"cannot read {str(error.filename)!r}: {error.strerror}") from error
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise LowcalError(f"{str(folder)!r} must hold a folder for each of two or more classes; found {found}")
    images = {name: [file for file in files if file.lower().endswith(ENDINGS)] for name, files in by_class.items()}
    if empty := [name for name, files in images.items() if not files]:
        raise LowcalError(
            f"class folders without a file of images (.jpg, .png, ...) in {str(folder)!r}: {_some(empty)}; "
            "fill or remove them"
        )
    files = [(file, label) for label, name in enumerate(classes) for file in images[name]]
    others = [file for name in classes for file in by_class[name] if not file.lower().endswith(ENDINGS)]
    return Listing(
        folder,
        tuple(classes),
        tuple(file for file, _ in files),
        tuple(label for _, label in files),
        tuple(f"{folder / file}: its ending is not one of images" for file in others),
    )


def _files(folder: Path, name: str) -> list[str]:
    """Return the files of one class, nested folders included."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, names in os.walk(folder / name, onerror=fail):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        below = os.path.relpath(parent, folder)
        found += [f"{below}/{file}" for file in names if not file.startswith(".")]
    return sorted(found)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
