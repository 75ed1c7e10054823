"""The settings of the methods: sections of a recipe. No torch is loaded, so that a mistake in them shows at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, make_dataclass
from typing import Annotated, Any, Literal

from lowcal.budget import Budget
from lowcal.errors import LowcalError
from lowcal.schedule import Fixed, NormTrend, Quadratic, Schedule
from lowcal.settings import Count, Fraction, Limits, Positive, Settings, annotations_of
from lowcal.supervision import Sign

SCHEDULES: dict[str, type[NormTrend | Quadratic | Fixed | Budget]] = {
    "norm-trend": NormTrend,
    "quadratic": Quadratic,
    "fixed": Fixed,
    "budget": Budget,
}
"""The schedules by their names in recipes."""

_KEYS = {"boundaries": "epochs"}  # fields that a recipe calls otherwise
_BUDGETS = ("speedup", "memory")  # of which the schedule 'budget' needs one
NEEDED = {
    name: [_KEYS.get(field.name, field.name) for field in fields(kind) if field.default is MISSING]
    for name, kind in SCHEDULES.items()
}
"""The settings that a schedule cannot do without. They are None for the others."""


def _schedule_fields() -> Iterator[tuple[str, Any, Any]]:
    yield "name", Literal[tuple(SCHEDULES)], "norm-trend"
    known = set()
    for kind in SCHEDULES.values():
        for field in fields(kind):
            key, annotation = _KEYS.get(field.name, field.name), annotations_of(kind)[field.name]
            if key not in known:
                yield (key, annotation | None, None) if field.default is MISSING else (key, annotation, field.default)
            known.add(key)


_ScheduleFields: Any = make_dataclass("_ScheduleFields", _schedule_fields(), bases=(Settings,), frozen=True)


class ScheduleSettings(_ScheduleFields):  # type: ignore[misc]
    """Where the boundary is: the `name` of a schedule, and the settings of all schedules together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for owner, keys in NEEDED.items():
            for key in keys:
                is_given = getattr(self, key) is not None
                if is_given and owner != self.name:
                    raise LowcalError(
                        f"local.schedule.{key} belongs to the schedule '{owner}', not to '{self.name}': "
                        f"set local.schedule.name={owner} or leave it out"
                    )
                if not is_given and owner == self.name:
                    raise LowcalError(f"local.schedule.{key} is missing: the schedule '{owner}' needs it")
        given = [key for key in _BUDGETS if getattr(self, key) is not None]
        if given and self.name != "budget":
            raise LowcalError(
                f"local.schedule.{given[0]} belongs to the schedule 'budget', not to '{self.name}': "
                "set local.schedule.name=budget or leave it out"
            )
        self.build()

    def build(self) -> Schedule:
        """The schedule that the settings describe."""
        kind = SCHEDULES[self.name]
        return kind(**{field.name: getattr(self, _KEYS.get(field.name, field.name)) for field in fields(kind)})


@dataclass(frozen=True)
class HebbianSettings(Settings):
    """The settings of `lowcal.Hebbian`, which explains them."""

    lr: Positive = 0.01
    decay: Fraction = 0.5
    decay_every: Count = 30
    scale: Literal["absolute", "relative"] = "absolute"
    every: Count = 1
    decay_from: Literal["start", "switch"] = "start"


@dataclass(frozen=True)
class LocalSettings(HebbianSettings):
    """Settings of `local`, `freeze` and `refresh`: of the local step (`Hebbian`), its sign, and the boundary.

    Attributes:
        refresh_every: optimizer steps from one with true gradients to the next, in `refresh` (`lowcal.Refresh`).
        norm_stats: what normalisation before the boundary normalises by (`lowcal.LoCal`).
        supervision: whether the training loss sets the sign of local updates (Algorithm 2).
        sign: how it does (`lowcal.LossTrend`).
        schedule: where the boundary is.
    """

    refresh_every: Annotated[int, Limits(least=2)] = 4
    norm_stats: Literal["batch", "running"] = "batch"
    supervision: bool = True
    sign: Sign = "recomputed"
    schedule: ScheduleSettings = ScheduleSettings()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class StochasticDepthSettings(Settings):
    """Settings of `stochastic-depth`.

    Attributes:
        survival: p_L, the probability with which the last residual block takes part.
    """

    survival: Fraction = 0.5


@dataclass(frozen=True)
class PruneSettings(Settings):
    """Settings of `prune`.

    Attributes:
        ratio: the penalty's part of the first mini-batch's whole loss.
        every: epochs from one removal of channels to the next.
        threshold: a channel is removed when no weight of it is this large in any layer.
    """

    ratio: Annotated[float, Limits(above=0, below=1)] = 0.2
    every: Count = 10
    threshold: Positive = 1e-4
