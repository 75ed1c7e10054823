"""Decoded images on disk, so that a folder of files is decoded once."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError
from lowcal.files import DamagedError, load_checked, save_checked

__all__ = ["cache_folder", "read_cache", "write_cache"]


def cache_folder() -> Path:
    """Where decoded and downloaded data go: $XDG_CACHE_HOME/lowcal, or ~/.cache/lowcal."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowcal"


def read_cache(place: str, key: str) -> dict[str, Any] | None:
    """Return what was stored for `place` under `key`; None if it is absent, out of date or damaged."""
    try:
        return load_checked(_path(place), f"cache-{key}")
    except DamagedError:
        return None


def write_cache(place: str, key: str, content: dict[str, Any]) -> None:
    """Store `content` (tensors and plain values) for `place`, instead of what was there.

    A full or read-only disk is no error: the next run decodes again.
    """
    path = _path(place)
    with contextlib.suppress(OSError, LowcalError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checked(path, f"cache-{key}", content, shared=True)


def _path(place: str) -> Path:
    return cache_folder() / "decoded" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.pt"
