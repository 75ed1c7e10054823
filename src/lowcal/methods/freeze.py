"""Layer freezing: the same boundary, but the layers before it keep their weights (Sec. 3.1)."""

from __future__ import annotations

from typing import ClassVar

from lowcal.methods.base import Fact
from lowcal.methods.local import Local
from lowcal.methods.settings import LocalSettings
from lowcal.rules import Frozen, Rule
from lowcal.supervision import Supervision


class Freeze(Local):
    """The layers before the boundary keep their weights, the others learn by SGD."""

    name: ClassVar[str] = "freeze"

    def _rule(self, settings: LocalSettings) -> Rule:
        return Frozen()

    def _supervision(self, settings: LocalSettings) -> Supervision | None:
        return None

    def facts(self) -> dict[str, Fact]:
        """The transition layer's change."""
        return {**super().facts(), "local_lr": None, "sign": None}
