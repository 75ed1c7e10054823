"""Local learning behind a moving boundary: the paper's method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowcal.local import LoCal
from lowcal.methods.base import Fact, Method
from lowcal.methods.settings import LocalSettings, build_schedule
from lowcal.parallel import DistributedLoCal
from lowcal.rules import Hebbian, Rule
from lowcal.supervision import LossTrend, Supervision


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
        self._layers = self._local._local_layers  # for steps that a CUDA graph replays
        self._parallel: DistributedLoCal | None = None
        self._facts: dict[str, Fact] = super().facts()
        return self._local.layers

    def _rule(self, settings: LocalSettings) -> Rule:
        return Hebbian(
            settings.lr,
            settings.decay,
            settings.decay_every,
            settings.scale,
            settings.every,
            decay_from=settings.decay_from,
        )

    def _supervision(self, settings: LocalSettings) -> Supervision | None:
        return LossTrend(settings.sign) if settings.supervision else None

    @property
    def boundary(self) -> int:
        """The number of leading layers that learn locally."""
        return self._local.boundary

    def move_to(self, boundary: int) -> None:
        """Sets the boundary by hand; never backwards."""
        self._local.move_to(boundary)

    def parallel(self, **ddp_options: Any) -> nn.Module:
        """The same at each call, since it follows the boundary by itself."""
        if self._parallel is None:
            self._parallel = DistributedLoCal(self.model, self._local, **ddp_options)
        return self._parallel

    @property
    def phase(self) -> int:
        """0 in steps in which the rule acts, 1 in those between."""
        return int(self.boundary > 0 and not self._layers.updates.is_due)

    def make_replayable(self, device: torch.device) -> None:
        """The length and sign of local steps."""
        self._layers.make_replayable(device)

    def replayed(self) -> None:
        """Counts the step, and opens or closes the layers before the boundary for the next one."""
        if self.boundary:
            self._layers.count_step(applied=self._layers.updates.is_due)

    def end_epoch(self, loss: float) -> bool:
        """Sets the sign of local updates and moves the boundary, as the schedule says."""
        facts: dict[str, Fact] = {"local_lr": self._local.lr, "sign": self._local.sign}
        moved = self._local.end_epoch(loss)
        self._facts = {
            **facts,
            "transition_change": self._local.change,
            "skipped_updates": self._layers.updates.skipped,
        }
        return moved

    def facts(self) -> dict[str, Fact]:
        """The local step's length and sign, the transition layer's change, the updates left out so far."""
        return dict(self._facts)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self._local.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the controller to where `state` was taken."""
        self._local.load_state_dict(state)

    def detach(self) -> None:
        """Removes the controller's hooks."""
        self._local.detach()
