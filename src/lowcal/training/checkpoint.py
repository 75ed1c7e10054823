"""Checkpoints that survive a crash, a full disk and a damaged file.

A new file is written beside the present one, which then becomes the previous one. Loading looks for all three
names. The weights of a finished run are written beside them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowcal.errors import LowcalError
from lowcal.files import DamagedError, atomic_write, load_checked, save_checked

FORMAT = 4  # 1 had no part of an epoch, 2 no growth of the batch, 3 two generators of mini-batches
KIND = "checkpoint"
PRESENT = "checkpoint.pt"
PREVIOUS = "checkpoint.prev.pt"
NEXT = "checkpoint.next.pt"
WEIGHTS = "model.pt"
SAFE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        state: what was saved, its tensors on the processor.
        path: the file it was read from.
        skipped: for each newer file that could not be used, its name and the reason.
    """

    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...]


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Saves `state`, tensors and plain values only, as the newest checkpoint in `folder`, and keeps the one before.

    Raises:
        LowcalError: the system refuses; the existing checkpoints are then intact.
    """
    save_checked(folder / NEXT, KIND, {"format": FORMAT, **state})
    _rename(folder)


def settle(path: Path) -> None:
    """Makes the checkpoint in `path` the present one, instead of newer ones that are damaged.

    This finishes a save that a crash interrupted before its renaming. The next save then keeps this checkpoint as the
    previous one, and not a damaged one.

    Raises:
        LowcalError: the system refuses.
    """
    folder = path.parent
    if path.name == NEXT:
        _rename(folder)
    elif path.name == PREVIOUS:
        _replace(path, folder / PRESENT)


def _rename(folder: Path) -> None:
    """Makes the next checkpoint the present one, and the present one the previous one."""
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
    """The newest undamaged checkpoint in `folder`; None if there is none at all.

    Raises:
        LowcalError: none of those there can be used, or one was written by another version of lowcal.
    """
    # The next one is there only if a crash came between its writing and its renaming.
    paths = [folder / name for name in (NEXT, PRESENT, PREVIOUS) if (folder / name).exists()]
    skipped: list[str] = []
    for path in paths:
        try:
            state = load_checked(path, KIND)
            if "format" not in state:
                raise DamagedError("does not hold a run's state")
        except DamagedError as error:
            skipped.append(f"{path} {error}")
            continue
        if state["format"] != FORMAT:
            raise LowcalError(
                f"{path} has checkpoint format {state['format']!r}, this lowcal reads {FORMAT}; "
                "resume with the lowcal that wrote it"
            )
        return Checkpoint(state, path, tuple(skipped))
    if skipped:
        raise LowcalError(f"no checkpoint can be used: {'; '.join(skipped)}; start a new run in another folder")
    return None


def export_weights(model: nn.Module, folder: Path) -> None:
    """Writes the `state_dict` as `model.pt`, for `torch.load` with `weights_only`, and as `model.safetensors`.

    The tensors are on the CPU and share no memory. Without the safetensors library the second file is left out.

    Raises:
        LowcalError: the system refuses; no part of a file is left.
    """
    buffer = io.BytesIO()
    torch.save(_weights(model), buffer)
    atomic_write(folder / WEIGHTS, buffer.getbuffer())
    write_safetensors(model, folder / SAFE_WEIGHTS)


def write_safetensors(model: nn.Module, path: Path, **metadata: str) -> None:
    """Writes the `state_dict` as safetensors with `metadata`; without that library nothing is written.

    Raises:
        LowcalError: the system refuses; no part of a file is left.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        return
    atomic_write(path, save(_weights(model), metadata={"format": "pt", **metadata}))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
