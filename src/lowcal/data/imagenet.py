"""ImageNet, or anything in its layout: train/<class>/* and val/<class>/*, too large for memory."""

import os
from pathlib import Path

import torch

from lowcal.data.cache import read_cache, write_cache
from lowcal.data.dataset import Files, Source
from lowcal.data.decoders import Decoders
from lowcal.data.listing import Listing, OnError, list_splits, require_every_class
from lowcal.errors import LowcalError

__all__ = ["read_imagenet"]

SIZE = 224
# Per channel over ImageNet's training images, as torchvision's pretrained networks have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_imagenet(folder: Path, image_size: int | None, on_error: OnError, workers: int | None) -> Source:
    """List train/ and val/ below `folder`; images are decoded when a batch needs them.

    A training image is a random part of its file scaled to 224x224 (or `image_size`) and mirrored half the time; for
    evaluation the shorter side is scaled to 256 and the middle kept. `on_error="skip"` first tries every file
    once, which the cache folder remembers; otherwise the first one that cannot be read stops training.
    """
    train, test = list_splits(folder, ("val",))
    decoders = Decoders(image_size or SIZE, workers)
    skipped: tuple[str, ...] = ()
    splits = []
    for listing in (train, test):
        bad = _unreadable_files(listing) if on_error == "skip" else {}
        skipped += listing.passed_over + tuple(f"{listing.folder / file}: {reason}" for file, reason in bad.items())
        kept = [place for place, file in enumerate(listing.files) if file not in bad]
        files = Files(tuple(listing.paths), torch.tensor(listing.labels), decoders, MEAN, STD)
        if bad:
            files = files.take(torch.tensor(kept, dtype=torch.int64))
        require_every_class(listing, files.labels)
        splits.append(files)
    return Source(train.classes, splits[0], splits[1], None, skipped)


def _unreadable_files(listing: Listing) -> dict[str, str]:
    """The files, with the reasons, that cannot be read; from the cache if none of all files has changed."""
    try:
        from lowcal.data.decode import try_files
    except ImportError as error:
        raise LowcalError("image files need Pillow and NumPy: pip install 'lowcal[cli]'") from error
    place, key = f"{listing.folder.resolve()} readable", listing.key()
    content = read_cache(place, key)
    if not isinstance(content, dict) or not all(isinstance(reason, str) for reason in content.values()):
        content = {os.path.relpath(path, listing.folder): reason for path, reason in try_files(listing.paths)}
        write_cache(place, key, content)
    return content
