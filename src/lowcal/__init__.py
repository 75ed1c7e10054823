"""Low-calorie SGD: train convolutional networks in less time and memory by letting first layers learn locally."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowcal.api import compare, train
    from lowcal.budget import Budget
    from lowcal.cache import Cached
    from lowcal.drop_path import save_drop_path
    from lowcal.errors import LowcalError
    from lowcal.local import LoCal
    from lowcal.parallel import DistributedLoCal
    from lowcal.rules import Frozen, Hebbian, Refresh, hebbian_update
    from lowcal.schedule import Fixed, NormTrend, Quadratic
    from lowcal.steps.make import make_step
    from lowcal.supervision import LossTrend

__version__ = "0.2.0"

__all__ = [
    "Budget",
    "Cached",
    "DistributedLoCal",
    "Fixed",
    "Frozen",
    "Hebbian",
    "LoCal",
    "LossTrend",
    "LowcalError",
    "NormTrend",
    "Quadratic",
    "Refresh",
    "compare",
    "hebbian_update",
    "make_step",
    "save_drop_path",
    "train",
]

_HOMES = {
    "Budget": "budget",
    "Cached": "cache",
    "DistributedLoCal": "parallel",
    "Fixed": "schedule",
    "Frozen": "rules",
    "Hebbian": "rules",
    "LoCal": "local",
    "LossTrend": "supervision",
    "LowcalError": "errors",
    "NormTrend": "schedule",
    "Quadratic": "schedule",
    "Refresh": "rules",
    "compare": "api",
    "hebbian_update": "rules",
    "make_step": "steps.make",
    "save_drop_path": "drop_path",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    # Names are loaded when first used: torch takes seconds, which the command's help and error lines need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module 'lowcal' has no attribute {name!r}")
    return getattr(import_module(f"lowcal.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
