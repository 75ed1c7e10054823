"""Files that are whole or not there: written so that no crash leaves a part of one, and JSON that says its format."""

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import LowcalError

__all__ = ["FORMAT", "atomic_write", "finite", "first_line", "read_json", "refused", "temporary", "write_json"]

FORMAT = 1


def atomic_write(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    The temporary file lies in the same folder under a fixed name, so that one left by a killed process is
    used again. Raises LowcalError if the system refuses; then the old file is intact and no other is left.
    """
    unfinished = temporary(path)
    try:
        try:
            with unfinished.open("wb") as file:
                file.write(data)
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
    return LowcalError(f"cannot write {path}: {error.strerror or error}; mend that or choose another folder")


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
