"""Freezing with true gradients now and then: ours, beyond the paper."""

from __future__ import annotations

from typing import ClassVar

from lowcal.methods.freeze import Freeze
from lowcal.methods.settings import LocalSettings
from lowcal.rules import Refresh as RefreshRule
from lowcal.rules import Rule


class Refresh(Freeze):
    """The layers before the boundary keep their weights, but learn by SGD with the others in every n-th step."""

    name: ClassVar[str] = "refresh"

    def _rule(self, settings: LocalSettings) -> Rule:
        return RefreshRule(settings.refresh_every)
