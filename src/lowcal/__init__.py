"""Low-calorie SGD: train convolutional networks in less time and memory by letting their first layers learn locally."""

from lowcal.errors import LowcalError
from lowcal.local import LoCal
from lowcal.parallel import DistributedLoCal
from lowcal.rules import Frozen, Hebbian, hebbian_update
from lowcal.schedule import Fixed, NormTrend, Quadratic
from lowcal.supervision import LossTrend

__version__ = "0.1.0"

__all__ = [
    "DistributedLoCal",
    "Fixed",
    "Frozen",
    "Hebbian",
    "LoCal",
    "LossTrend",
    "LowcalError",
    "NormTrend",
    "Quadratic",
    "hebbian_update",
]
