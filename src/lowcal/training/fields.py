"""The fields of a run's files that readers compute with; a file may hold more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError

_COSTS = ("boundary", "layers", "seconds", "flops", "peak_memory_bytes")
EPOCH_FIELDS = (*_COSTS, "epoch", "train_loss", "test_loss", "top1_error", "total_seconds", "step_ms")
IDENTITY_FIELDS = ("method", "recipe", "seed", "epochs", "model", "dataset", "label")
SUMMARY_FIELDS = (*IDENTITY_FIELDS, *_COSTS, "top1_error")
_TEXTS = frozenset({"method", "recipe", "model", "dataset", "label"})
_MAY_BE_NULL = frozenset({"label", "train_loss", "test_loss", "top1_error"})


def check_fields(value: Mapping[str, Any], fields: tuple[str, ...], path: Path, where: str = "") -> None:
    """Check that `value`, what the file `path` holds, has these `fields`, each of its type; LowcalError if not."""
    for name in fields:
        if name not in value:
            raise LowcalError(f"{where}{path} lacks {name!r}; use the lowcal that wrote it, or leave it out")
        entry = value[name]
        kinds = str if name in _TEXTS else int | float
        if (entry is None and name in _MAY_BE_NULL) or (isinstance(entry, kinds) and not isinstance(entry, bool)):
            continue
        raise LowcalError(f"{where}{path}: {name!r} is {entry!r}, not what lowcal writes; restore the file")
