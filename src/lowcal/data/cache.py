"""Decoded images on disk, so that a folder of files is decoded once."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_folder", "read_cache", "write_cache"]

MAGIC = "lowcal decoded images 1"


def cache_folder() -> Path:
    """Where decoded and downloaded data go: $XDG_CACHE_HOME/lowcal, or ~/.cache/lowcal."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowcal"


def _path(place: str) -> Path:
    return cache_folder() / "decoded" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.pt"


def read_cache(place: str, key: str) -> dict[str, Any] | None:
    """Return what was stored for `place` under `key`, or None if absent, out of date or damaged in whatever way.

    A file is one header line (JSON: magic, key, checksum, length), then what torch.save wrote.
    """
    try:
        with _path(place).open("rb") as file:
            header = json.loads(file.readline(4096))
            if not isinstance(header, dict) or (header.get("magic"), header.get("key")) != (MAGIC, key):
                return None
            payload = file.read()
    except (OSError, ValueError, RecursionError):  # of deeply nested JSON
        return None
    if (len(payload), zlib.crc32(payload)) != (header.get("length"), header.get("crc32")):
        return None
    try:
        return torch.load(io.BytesIO(payload), weights_only=True)
    except Exception:  # torch.load and what it reads with raise whatever damaged bytes lead them to
        return None


def write_cache(place: str, key: str, content: dict[str, Any]) -> None:
    """Store `content` (tensors and plain values) for `place`, in place of what was there.

    The file appears whole or not at all, and its checksum finds damage. A full or read-only disk is no error:
    the next run decodes again.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    header = {"magic": MAGIC, "key": key, "crc32": zlib.crc32(payload), "length": len(payload)}
    path = _path(place)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(payload)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
