"""What `step="auto"` measured, kept in the run's folder, so that no later run of an experiment measures it again."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError, is_number
from lowcal.files import FORMAT, read_json, write_json
from lowcal.training.run_folder import STEP


def recall(folder: Path, key: Hashable, modes: Sequence[str]) -> dict[str, float] | None:
    """What `keep` was given for `key` by the run in `folder`, or by a run next to it; None: nothing.

    Files that are damaged, or not of lowcal, are passed over. So are times of other modes than `modes`, and times
    without the first of these.
    """
    for path in sorted(folder.parent.glob(f"*/{STEP}")):
        times = _choices(path).get(_digest(key))
        if isinstance(times, dict) and {modes[0]} <= times.keys() <= set(modes) and all(map(is_number, times.values())):
            return times
    return None


def keep(folder: Path, key: Hashable, times: Mapping[str, float]) -> None:
    """Writes the time of a step in each mode, the chosen mode last. The `repr` of `key` is that of all processes."""
    path = folder / STEP
    write_json(path, {"format": FORMAT, "choices": {**_choices(path), _digest(key): dict(times)}})


def _choices(path: Path) -> dict[str, Any]:
    try:
        choices = read_json(path).get("choices")
    except LowcalError:
        return {}
    return choices if isinstance(choices, dict) else {}


def _digest(key: Hashable) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()
