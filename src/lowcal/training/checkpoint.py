"""Checkpoints that a crash, a full disk or a damaged file cannot take away.

A new file is written beside the present one, which then becomes the previous one; each of the three names is looked at
when loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError
from lowcal.files import DamagedError, load_checked, save_checked

FORMAT = 4  # 1 had no part of an epoch, 2 no growth of the batch, 3 two generators of mini-batches
KIND = "checkpoint"
PRESENT = "checkpoint.pt"
PREVIOUS = "checkpoint.prev.pt"
NEXT = "checkpoint.next.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        state: what was saved, its tensors on the processor.
        path: the file it was read from.
        passed_over: for each newer file that could not be used, which one and why.
    """

    state: dict[str, Any]
    path: Path
    passed_over: tuple[str, ...]


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Saves `state`, tensors and plain values only, as the newest checkpoint in `folder` and keeps the one before.

    Raises:
        LowcalError: the system refuses; the checkpoints that were there are intact then.
    """
    save_checked(folder / NEXT, KIND, {"format": FORMAT, **state})
    _rename(folder)


def settle(path: Path) -> None:
    """Makes the checkpoint in `path` the present one, instead of newer ones that are damaged.

    So a saving that a crash broke off before its renaming is ended, and the next one keeps this checkpoint, and not a
    damaged one, as the previous.

    Raises:
        LowcalError: the system refuses.
    """
    folder = path.parent
    if path.name == NEXT:
        _rename(folder)
    elif path.name == PREVIOUS:
        _replace(path, folder / PRESENT)


def _rename(folder: Path) -> None:
    """Makes the next checkpoint the present one, and that the previous one."""
    if (folder / PRESENT).exists():
        _replace(folder / PRESENT, folder / PREVIOUS)
    _replace(folder / NEXT, folder / PRESENT)


def _replace(path: Path, target: Path) -> None:
    try:
        path.replace(target)
    except OSError as error:
        raise LowcalError(
            f"cannot rename {path}: {error.strerror}; make the folder writable and resume from this file"
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole; None if it has none at all.

    Raises:
        LowcalError: none of those there can be used, or one was written by another version of lowcal.
    """
    # The next one is there only if a crash came between its writing and its renaming.
    paths = [folder / name for name in (NEXT, PRESENT, PREVIOUS) if (folder / name).exists()]
    passed_over: list[str] = []
    for path in paths:
        try:
            state = load_checked(path, KIND)
            if "format" not in state:
                raise DamagedError("does not hold a run's state")
        except DamagedError as error:
            passed_over.append(f"{path} {error}")
            continue
        if state["format"] != FORMAT:
            raise LowcalError(
                f"{path} has checkpoint format {state['format']!r}, this lowcal reads {FORMAT}; "
                "resume with the lowcal that wrote it"
            )
        return Checkpoint(state, path, tuple(passed_over))
    if passed_over:
        raise LowcalError(f"no checkpoint can be used: {'; '.join(passed_over)}; start the run anew in another folder")
    return None
