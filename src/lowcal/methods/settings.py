"""The settings of local learning, and the schedule that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from lowcal.errors import LowcalError, nearest
from lowcal.schedule import Fixed, NormTrend, Quadratic, Schedule

SCHEDULES = ("norm-trend", "quadratic", "fixed")


class ScheduleSettings(Protocol):
    """Which schedule, and its settings; those of the other schedules are None or unused."""

    @property
    def name(self) -> str:
        """One of `SCHEDULES`."""

    @property
    def alpha(self) -> float:
        """Of `NormTrend`."""

    @property
    def shift(self) -> int | None:
        """Of `NormTrend`."""

    @property
    def interval(self) -> int | None:
        """Of `NormTrend`."""

    @property
    def max_fraction(self) -> float:
        """Of `NormTrend` and `Quadratic`."""

    @property
    def spacing(self) -> Literal["listing", "prose"]:
        """Of `NormTrend`."""

    @property
    def measure(self) -> Literal["epoch", "step"]:
        """Of `NormTrend`."""

    @property
    def average(self) -> Literal["layer", "run"]:
        """Of `NormTrend`."""

    @property
    def align(self) -> Literal["layer", "block"]:
        """Of `NormTrend`."""

    @property
    def c1(self) -> float | None:
        """Of `Quadratic`."""

    @property
    def c2(self) -> float | None:
        """Of `Quadratic`."""

    @property
    def epochs(self) -> Mapping[int, int] | None:
        """Of `Fixed`: the boundary by epoch."""


class LocalSettings(Protocol):
    """The section `local` of a recipe, or anything with its fields."""

    @property
    def lr(self) -> float:
        """Of `Hebbian`, as are the next five."""

    @property
    def decay(self) -> float:
        """Factor on `lr`."""

    @property
    def decay_every(self) -> int:
        """Epochs between decays."""

    @property
    def scale(self) -> Literal["absolute", "relative"]:
        """What a step's length is measured by."""

    @property
    def every(self) -> int:
        """Optimizer steps from one local update to the next."""

    @property
    def decay_from(self) -> Literal["start", "switch"]:
        """What epochs are counted from for the decay."""

    @property
    def refresh_every(self) -> int:
        """Of `Refresh`: optimizer steps from one with true gradients to the next."""

    @property
    def norm_stats(self) -> Literal["batch", "running"]:
        """What normalisation before the boundary normalises by."""

    @property
    def supervision(self) -> bool:
        """Whether the training loss sets the sign of local updates (Algorithm 2)."""

    @property
    def sign(self) -> Literal["recomputed", "kept"]:
        """Of `LossTrend`."""

    @property
    def schedule(self) -> ScheduleSettings:
        """Where the boundary is."""


def build_schedule(settings: ScheduleSettings) -> Schedule:
    """The schedule that `settings` describe.

    Raises:
        LowcalError: there is none of that name, or it lacks a setting that it needs.
    """
    if settings.name == "norm-trend":
        return NormTrend(
            settings.alpha,
            settings.shift,
            settings.max_fraction,
            settings.interval,
            spacing=settings.spacing,
            measure=settings.measure,
            average=settings.average,
            align=settings.align,
        )
    if settings.name == "quadratic":
        if settings.c1 is None or settings.c2 is None:
            raise LowcalError("the schedule 'quadratic' needs c1 and c2; set schedule.c1 and schedule.c2")
        return Quadratic(settings.c1, settings.c2, settings.max_fraction)
    if settings.name == "fixed":
        if settings.epochs is None:
            raise LowcalError("the schedule 'fixed' needs its moves; set schedule.epochs, as in {10: 3, 20: 6}")
        return Fixed(settings.epochs)
    raise LowcalError(f"there is no schedule {settings.name!r}{nearest(settings.name, SCHEDULES)}")
