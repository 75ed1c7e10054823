"""The methods with a moving boundary: local learning (the paper's), layer freezing, and freezing with refreshes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowcal.budget import Budget
from lowcal.cache import Cached, Inputs
from lowcal.local import LoCal
from lowcal.method_settings import LocalSettings
from lowcal.methods.base import Fact, Method
from lowcal.overlap import Overlap
from lowcal.parallel import DistributedLoCal
from lowcal.rules import Frozen, Hebbian, Rule
from lowcal.rules import Refresh as RefreshRule
from lowcal.schedule import Fixed, reach
from lowcal.settings import annotations_of
from lowcal.supervision import LossTrend, Supervision


class Local(Method):
    """The layers before the boundary learn by local updates, the others by SGD."""

    name: ClassVar[str] = "local"
    settings: LocalSettings

    def _attach(self, example_inputs: Tensor) -> tuple[str, ...]:
        rule, schedule = self._rule(), self.settings.schedule.build()
        self.period = rule.every
        if isinstance(schedule, Budget) and schedule.memory is not None:
            schedule = Fixed({})  # what builds a run knows its mini-batch, and moves the boundary
        self._local = LoCal(
            self.model,
            self.optimizer,
            epochs=self.epochs,
            rule=rule,
            schedule=schedule,
            supervision=self._supervision(),
            norm_stats=self.settings.norm_stats,
            example_inputs=example_inputs,
        )
        self._layers = self._local._local_layers  # for steps that a CUDA graph replays
        self._parallel: DistributedLoCal | None = None
        self._facts: dict[str, Fact] = super().facts()
        return self._local.layers

    def _rule(self) -> Rule:
        return Hebbian(**{name: getattr(self.settings, name) for name in annotations_of(Hebbian)})

    def _supervision(self) -> Supervision | None:
        return LossTrend(self.settings.sign) if self.settings.supervision else None

    @property
    def boundary(self) -> int:
        """The number of leading layers that learn locally."""
        return self._local.boundary

    def move_to(self, boundary: int) -> None:
        """Sets the boundary by hand; never backwards."""
        self._local.move_to(boundary)

    @property
    def middle(self) -> int:
        """A boundary in the middle of those that training can reach from here on."""
        return (self.boundary + reach(self._local.schedule, len(self.layers)) + 1) // 2

    def parallel(self, **ddp_options: Any) -> nn.Module:
        """The same module at every call: it follows the boundary by itself."""
        if self._parallel is None:
            self._parallel = DistributedLoCal(self.model, self._local, **ddp_options)
        return self._parallel

    @property
    def phase(self) -> int:
        """0 if the rule acts in the next step, else 1."""
        return self._layers.phase

    def make_replayable(self, device: torch.device) -> None:
        """Keeps the length and sign of local steps on `device`."""
        self._layers.make_replayable(device)

    def overlapped(self, overlap: Overlap) -> AbstractContextManager[None]:
        """Inside it, products of local updates run by `overlap`."""
        return self._layers.overlapped(overlap)

    def replayed(self) -> None:
        """Counts the step, and lets the layers before the boundary learn by SGD in the next one or not."""
        self._layers.replayed()

    def end_epoch(self, loss: float) -> bool:
        """Sets the sign of local updates and moves the boundary as the schedule decides."""
        facts: dict[str, Fact] = {"local_lr": self._local.lr, "sign": self._local.sign}
        moved = self._local.end_epoch(loss)
        self._facts = {
            **facts,
            "transition_change": self._local.change,
            "skipped_updates": self._layers.updates.skipped,
        }
        return moved

    def plan(self, times: Mapping[int, float]) -> tuple[str, float]:
        """Takes step times by boundary, measured before the run; returns a line on the path and its speed-up.

        Raises:
            LowcalError: the budget of time is out of reach.
        """
        budget, steps = self._local.schedule, self._local._times
        assert isinstance(budget, Budget)
        assert steps is not None
        steps.measured = dict(times)
        progress = self._local._progress(0, ())
        budget.check_times(progress)
        return budget.describe(progress)[0], budget.reached(progress)

    def results(self) -> dict[str, Fact]:
        """The speed-up that a budget of time asked for, and the one reached, by step times."""
        budget = self._local.schedule
        if not isinstance(budget, Budget):
            return {}
        reached = budget.reached(self._local._progress(self._local.epoch, ()))
        return {"asked_speedup": budget.speedup, "measured_speedup": reached}

    def facts(self) -> dict[str, Fact]:
        """The local step's length and sign, the transition layer's change, and the updates skipped so far."""
        return dict(self._facts)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self._local.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the controller from `state`."""
        self._local.load_state_dict(state)

    def detach(self) -> None:
        """Removes the controller's hooks."""
        self._local.detach()


class Freeze(Local):
    """The layers before the boundary keep their weights, the others learn by SGD (Sec. 3.1)."""

    name: ClassVar[str] = "freeze"
    caches: ClassVar[bool] = True

    def _rule(self) -> Rule:
        return Frozen()

    def _supervision(self) -> Supervision | None:
        return None

    @property
    def middle(self) -> int:
        """0: frozen layers make no updates."""
        return 0

    def cached(self, inputs: Inputs | Callable[[int], Inputs], **options: Any) -> Cached:
        """The network with the layers before the boundary computed once for each image."""
        return Cached(self._local, inputs, **options)

    def boundaries(self) -> list[int]:
        """The boundaries above 0 that training can have from here on, ascending."""
        schedule, now = self._local.schedule, self.boundary
        planned = (
            schedule.boundaries.values()
            if isinstance(schedule, Fixed)
            else range(now, reach(schedule, len(self.layers)) + 1)
        )
        return sorted({now, *(boundary for boundary in planned if boundary > now)} - {0})

    def facts(self) -> dict[str, Fact]:
        """The transition layer's change."""
        return {**super().facts(), "local_lr": None, "sign": None}


class Refresh(Freeze):
    """The layers before the boundary keep their weights, but learn by SGD once every n steps.

    Ours, beyond the paper.
    """

    name: ClassVar[str] = "refresh"
    caches: ClassVar[bool] = False

    def _rule(self) -> Rule:
        return RefreshRule(self.settings.refresh_every)
