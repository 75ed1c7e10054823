"""Image files below train/ and test/ or val/, one folder per class: decoded into memory, or listed for each batch."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from PIL import __version__ as pillow_version
from torch import Tensor

from lowcal.data.dataset import Augmentation, Files, Images, Source
from lowcal.data.images import Decoders, Decoding, OnError, decode_files, unreadable, unreadable_files
from lowcal.data.policy import Policy
from lowcal.errors import LowcalError
from lowcal.files import DamagedError, load_checked, memory, save_checked

NAMED = 5  # names that an error lists
MANY = 1000  # files, which take a second or more
# Those of torchvision's ImageFolder, and more of formats that Pillow reads.
ENDINGS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jpe", ".jp2", ".apng", ".pbm", ".pnm", ".tga", ".avif",
)  # fmt: skip
DECODED = "decoded"  # the folder within the cache
SIZE = 224
# Per channel over ImageNet's training images, as torchvision's pretrained networks have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Watcher(Protocol):
    """Is told how far the decoding of files is."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """What takes time now, and how much of it is done; "" at its end."""


def read_folders(
    folder: Path,
    size: int,
    on_error: OnError,
    fit: Callable[[Image.Image, int], Image.Image],
    watcher: Watcher | None = None,
) -> Source:
    """Decode train/ and test/ (or val/) below `folder`; `fit`, a named function, brings an image to size x size."""
    splits = list_splits(folder, ("test", "val"))
    _check_memory(sum(len(listing.files) for listing in splits), size, folder)
    parts, skipped = [], []
    for listing in splits:
        content = _cached(
            listing.folder,
            f"{fit.__name__} {size}",
            listing.key(),
            lambda listing=listing: _decode(listing, size, on_error, fit, watcher),  # type: ignore[misc]
        )
        left_out = [f"{listing.folder / name}: {reason}" for name, reason in content["skipped"]]
        if left_out and on_error == "stop":  # cached by a run that skips
            raise unreadable(left_out[0])
        listing.require_every_class(content["labels"])
        parts.append(Images(content["pixels"], content["labels"]))
        skipped += [*listing.passed_over, *left_out]
    return Source(splits[0].classes, parts[0], parts[1], Augmentation(pad=size // 8, flip=True), tuple(skipped))


def read_imagenet(
    folder: Path,
    image_size: int | None,
    on_error: OnError,
    workers: int | None,
    policy: Policy,
    watcher: Watcher | None = None,
) -> Source:
    """List train/ and val/ below `folder`; images are decoded when a batch needs them.

    A training image is a random part of its file scaled to 224x224 (or `image_size`) and flipped half the time, if
    `policy` crops. Else, and for evaluation, the shorter side is scaled to 256 and the middle kept. `on_error="skip"`
    first reads every file once, which the cache folder remembers; otherwise the first unreadable file stops training.
    """
    splits = list_splits(folder, ("val",))
    size = image_size or SIZE
    decoders = Decoders((3, size, size), partial(Decoding, size, policy), workers)
    parts, skipped = [], []
    for listing in splits:
        bad: dict[str, str] = {}
        if on_error == "skip":
            bad = _cached(
                listing.folder,
                "readable",
                listing.key(),
                lambda listing=listing: _unreadable(listing, watcher),  # type: ignore[misc]
            )
        kept = [position for position, file in enumerate(listing.files) if file not in bad]
        files = Files(tuple(listing.paths), torch.tensor(listing.labels), decoders, MEAN, STD)
        files = files.take(torch.tensor(kept, dtype=torch.int64)) if bad else files
        listing.require_every_class(files.labels)
        parts.append(files)
        skipped += [*listing.passed_over, *(f"{listing.folder / file}: {reason}" for file, reason in bad.items())]
    return Source(splits[0].classes, parts[0], parts[1], None, tuple(skipped))


@dataclass(frozen=True)
class Listing:
    """The image files of one split, class by class in the order of the classes' names; `files` are below `folder`.

    `passed_over` are the files whose ending is not one of images, each with the reason.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    passed_over: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """The files with their folder, as strings: ten thousand Path objects are slow."""
        return [f"{self.folder}/{file}" for file in self.files]

    def key(self) -> str:
        """A digest that changes when a file is added, removed, renamed or written, or the decoder changes."""
        digest = hashlib.sha256(pillow_version.encode())
        for file, path in zip(self.files, self.paths, strict=True):
            try:
                status = os.stat(path)
                state = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
            except OSError:
                state = "\0unreadable\n"  # for example a broken link; decoding it gives the error
            digest.update(os.fsencode(file) + state.encode())
        return digest.hexdigest()

    def require_every_class(self, labels: Tensor) -> None:
        """Raise LowcalError unless each class is among `labels`, int64 (N,), of the readable images."""
        counts = torch.bincount(labels, minlength=len(self.classes)).tolist()
        if lost := [name for name, count in zip(self.classes, counts, strict=True) if count == 0]:
            raise LowcalError(f"class folders of {str(self.folder)!r} without one readable image: {_some(lost)}")


def list_splits(folder: Path, held_out: Sequence[str]) -> tuple[Listing, Listing]:
    """List train/ and the first existing folder of `held_out`; both have the same two or more classes."""
    if not folder.is_dir():
        raise LowcalError(f"no data folder {str(folder)!r}: give an existing one with --data-dir")
    other = next((name for name in held_out if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or other is None:
        found = _some(sorted(p.name for p in folder.iterdir())) or "nothing"
        wanted = f"{held_out[0]}/" + "".join(f" (or {name}/)" for name in held_out[1:])
        raise LowcalError(f"{str(folder)!r} must hold train/ and {wanted}; it holds {found}")
    train, test = _list(folder / "train"), _list(folder / other)
    parts = []
    for name, one, two in (("train", train, test), (other, test, train)):
        if only := sorted(set(one.classes) - set(two.classes)):
            parts.append(f"only in {name}/: {_some(only)}")
    if parts:
        raise LowcalError(f"class folders of {str(folder)!r} differ: {'; '.join(parts)}; make them equal")
    return train, test


def class_folders(folder: Path) -> list[str]:
    """The names of the classes below one split's folder, in order; OSError if it cannot be read."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


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
    others = [file for files in by_class.values() for file in files if not file.lower().endswith(ENDINGS)]
    return Listing(
        folder,
        tuple(classes),
        tuple(file for files in images.values() for file in files),
        tuple(label for label, files in enumerate(images.values()) for _ in files),
        tuple(f"{folder / file}: its ending is not one of images" for file in others),
    )


def _files(folder: Path, name: str) -> list[str]:
    """The files of one class, nested folders included."""

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


def _unreadable(listing: Listing, watcher: Watcher | None) -> dict[str, Any]:
    """The files that cannot be read, and why."""
    with _watched(listing, "reading", watcher) as watch:
        failures = unreadable_files(listing.paths, watch)
    return {listing.files[position]: reason for position, reason in failures.items()}


def _decode(
    listing: Listing,
    size: int,
    on_error: OnError,
    fit: Callable[[Image.Image, int], Image.Image],
    watcher: Watcher | None,
) -> dict[str, Any]:
    with _watched(listing, "decoding", watcher, 3 * size * size) as watch:
        pixels, failures = decode_files(listing.paths, size, fit, on_error, watch)
    labels = torch.tensor(listing.labels)
    if failures:
        read = torch.ones(len(labels), dtype=torch.bool)
        read[list(failures)] = False
        pixels, labels = pixels[read], labels[read]
    skipped = [(listing.files[position], reason) for position, reason in failures.items()]
    return {"pixels": pixels, "labels": labels, "skipped": skipped}


@contextmanager
def _watched(
    listing: Listing, verb: str, watcher: Watcher | None, size: int = 0
) -> Iterator[Callable[[int], None] | None]:
    """Tell the watcher of many files before they are read, and give what tells it how many have been.

    Args:
        size: bytes that an image takes in the cache.
    """
    count = len(listing.files)
    if watcher is None or count < MANY:
        yield None
        return
    takes = f" ({memory(count * size)})" if size else ""
    watcher.note(
        f"{verb} {count:,} images of {listing.folder}, once: the result is kept in {cache_folder()}{takes}; "
        "lowcal cache lists and clears it"
    )
    try:
        yield lambda done: watcher.stage(verb, done, count)
    finally:
        watcher.stage("")


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


def cache_folder() -> Path:
    """The folder of decoded and downloaded data: $XDG_CACHE_HOME/lowcal, or ~/.cache/lowcal."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowcal"


def _cached(folder: Path, use: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned for this use of `folder` with this `key` before; else call it and keep its result.

    A cached file that is damaged or has another key is ignored. A full or read-only disk is no error: the next run
    calls `make` again.
    """
    place = folder.resolve()
    name = re.sub(r"\W+", "-", f"{place.parent.name}-{place.name}-{use}")  # for people; the digest tells places apart
    path = cache_folder() / DECODED / f"{name}-{hashlib.sha256(f'{place} {use}'.encode()).hexdigest()[:8]}.pt"
    kind = f"decoded-1-{key}"
    try:
        return load_checked(path, kind)
    except DamagedError:
        content = make()
    with suppress(OSError, LowcalError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checked(path, kind, content, shared=True)
    return content
