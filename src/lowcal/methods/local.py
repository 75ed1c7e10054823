"""Local learning behind a moving boundary: the paper's method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lowcal.errors import LowcalError, nearest
from lowcal.local import LoCal
from lowcal.methods.base import Fact, LocalSettings, Method, ScheduleSettings
from lowcal.rules import Hebbian, Rule
from lowcal.schedule import Fixed, NormTrend, Quadratic, Schedule
from lowcal.supervision import LossTrend, Supervision

SCHEDULES = ("norm-trend", "quadratic", "fixed")


def build_schedule(settings: ScheduleSettings) -> Schedule:
    """The schedule that the settings name.

    Raises:
        LowcalError: there is none of that name, or it lacks a setting that it needs.
    """
    if settings.name == "norm-trend":
        return NormTrend(settings.alpha, settings.shift, settings.max_fraction, settings.interval)
    if settings.name == "quadratic":
        if settings.c1 is None or settings.c2 is None:
            raise LowcalError("the schedule 'quadratic' needs c1 and c2; set schedule.c1 and schedule.c2")
        return Quadratic(settings.c1, settings.c2, settings.max_fraction)
    if settings.name == "fixed":
        if settings.epochs is None:
            raise LowcalError("the schedule 'fixed' needs its moves; set schedule.epochs, as in {10: 3, 20: 6}")
        return Fixed(settings.epochs)
    raise LowcalError(f"there is no schedule {settings.name!r}{nearest(settings.name, SCHEDULES)}")


class Local(Method):
    """The layers before the boundary learn by local updates, the others by SGD."""

    name: ClassVar[str] = "local"

    def _attach(self, example_inputs: Tensor) -> tuple[str, ...]:
        rule = self._rule(self.settings)
        self.period = rule.every
        self._local = LoCal(
            self.model,
            self.optimizer,
            epochs=self.epochs,
            rule=rule,
            schedule=build_schedule(self.settings.schedule),
            supervision=self._supervision(self.settings),
            norm_stats=self.settings.norm_stats,
            example_inputs=example_inputs,
        )
        self._facts: dict[str, Fact] = super().facts()
        return self._local.layers

    def _rule(self, settings: LocalSettings) -> Rule:
        return Hebbian(settings.lr, settings.decay, settings.decay_every, settings.scale, settings.every)

    def _supervision(self, settings: LocalSettings) -> Supervision | None:
        return LossTrend() if settings.supervision else None

    @property
    def boundary(self) -> int:
        return self._local.boundary

    def move_to(self, boundary: int) -> None:
        self._local.move_to(boundary)

    def end_epoch(self, loss: float) -> bool:
        facts: dict[str, Fact] = {"local_lr": self._local.lr, "sign": self._local.sign}
        moved = self._local.end_epoch(loss)
        self._facts = {**facts, "transition_change": self._local.change, "skipped_updates": self._local.skipped}
        return moved

    def facts(self) -> dict[str, Fact]:
        return dict(self._facts)

    def state_dict(self) -> dict[str, Any]:
        return self._local.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._local.load_state_dict(state)

    def detach(self) -> None:
        self._local.detach()
