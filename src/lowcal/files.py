"""Files that are whole or absent: atomic writes, files with a checksum, and JSON with a format number."""

import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError

__all__ = [
    "FORMAT", "DamagedError", "atomic_write", "finite", "first_line", "free_folder", "load_checked", "memory",
    "read_json", "refused", "save_checked", "temporary", "write_json",
]  # fmt: skip

FORMAT = 1
_LONGEST_HEADER = 300  # bytes


class DamagedError(Exception):
    """What is wrong with a file, as the rest of a sentence that begins with the file's name."""


def atomic_write(path: Path, *parts: bytes | bytearray | memoryview, shared: bool = False) -> None:
    """Write `parts` to `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    The temporary file lies in the same folder under a fixed name, so that one left by a killed process is
    used again; with `shared`, where several processes may write `path` at once, each has its own.

    Raises:
        LowcalError: the system refuses. The old file is then intact and no other is left.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp") if shared else temporary(path)
    try:
        try:
            with unfinished.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise refused(path, error) from error


def save_checked(path: Path, kind: str, state: Mapping[str, Any], *, shared: bool = False) -> None:
    """Write `state`, tensors and plain values only, atomically with its checksum.

    The file is one line, ``lowcal-<kind> <sha256> <bytes>``, and then what `torch.save` writes.

    Raises:
        LowcalError: as `atomic_write`.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getbuffer()
    header = f"lowcal-{kind} {hashlib.sha256(payload).hexdigest()} {len(payload)}\n"
    atomic_write(path, header.encode(), payload, shared=shared)


def load_checked(path: Path, kind: str) -> dict[str, Any]:
    """Return the state that `save_checked` wrote, its tensors on the CPU. Nothing in the file is executed.

    Raises:
        DamagedError: the file is absent, of another kind, or damaged in any way.
    """
    import torch

    try:
        with path.open("rb") as file:
            fields = file.readline(_LONGEST_HEADER).split(b" ")
            if len(fields) != 3 or fields[0] != f"lowcal-{kind}".encode() or not re.fullmatch(rb"\d+\n", fields[2]):
                raise DamagedError(f"is not a {kind} of lowcal, or its first line is damaged")
            payload = file.read()
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror})") from error
    if len(payload) != int(fields[2]):
        raise DamagedError(f"holds {len(payload)} bytes where its first line says {int(fields[2])}")
    if hashlib.sha256(payload).hexdigest().encode() != fields[1]:
        raise DamagedError("is damaged (its checksum differs)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever damaged bytes lead it to
        raise DamagedError("holds something other than tensors and plain values") from error
    if not isinstance(state, dict):
        raise DamagedError("does not hold a state")
    return state


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` atomically as indented JSON; a number that is not finite is written as null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, f"{text}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of lowcal's; LowcalError if it is damaged or of another format."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise LowcalError(f"cannot read {path}: {error.strerror}; is it a run folder's file?") from error
    except ValueError as error:
        raise LowcalError(f"{path} is damaged ({first_line(error)}); restore it or leave it out") from error
    if not isinstance(value, dict) or "format" not in value:
        raise LowcalError(f"{path} was not written by lowcal: it has no 'format'; leave this folder out")
    if value["format"] != FORMAT:
        raise LowcalError(
            f"{path} has format {value['format']!r}, this lowcal reads {FORMAT}; use the lowcal that wrote it"
        )
    return value


def temporary(path: Path) -> Path:
    """The file that `atomic_write` writes before it has its name."""
    return path.with_name(f".{path.name}.tmp")


def free_folder(wanted: Path) -> Path:
    """Return `wanted`, or the first of WANTED-2, WANTED-3, ... that does not exist."""
    candidates = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    return next(path for path in chain([wanted], candidates) if not os.path.lexists(path))


def _sync_folder(path: Path) -> None:
    if sys.platform == "win32":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused(path: Path, error: OSError) -> LowcalError:
    """The system's refusal to write `path`, as an error that says what to do."""
    return LowcalError(f"cannot write {path}: {error.strerror or error}; fix that or choose another folder")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0]


def finite(value: Any) -> Any:
    """`value` with None for each number in it that is not finite, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def memory(count: float, *, of: float | None = None) -> str:
    """Return a number of bytes in binary units, '1.21 GiB'; with `of` in the unit of that number."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if (count if of is None else of) >= 1024**power:
            value = count / 1024**power
            digits = 2 - math.floor(math.log10(value)) if value >= 1 else 2
            return f"{value:.{max(0, digits)}f} {unit}"
    return f"{count:.0f} B"
