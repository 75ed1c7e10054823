"""The arms of an experiment, and the interface that shows their progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lowcal.training.epoch import Progress


@dataclass(frozen=True)
class Arm:
    """One training run of an experiment: a method and a seed.

    Attributes:
        variant: names the settings that differ from the other arms of the same method; "" for none.
        epochs: its number of epochs, if that differs from the other arms.
    """

    method: str
    seed: int
    variant: str = ""
    epochs: int | None = None

    @property
    def folder(self) -> str:
        """The name of its run folder within the experiment's."""
        return f"{self.method}{'-' * bool(self.variant)}{self.variant}-seed{self.seed}"


class Watcher(Protocol):
    """Receives what happens in a run; `lowcal.console` shows it on a terminal."""

    def note(self, text: str) -> None:
        """A line for the user, such as that a run is resumed."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """What takes time before the epochs, and how much of it is done if `total` is known; "" at its end."""

    def begin(self, arms: Sequence[Arm], finished: Sequence[int], epochs: int, *, later: int = 0) -> None:
        """The arms that now run in turn, and the finished epochs of each.

        Each has `epochs` epochs unless the arm sets its own; `later` epochs of other arms follow.
        """

    def step(self, arm: Arm, progress: Progress) -> None:
        """Progress within an epoch."""

    def epoch(self, arm: Arm, record: Mapping[str, Any]) -> None:
        """An epoch has ended; `record` is its line in `epochs.jsonl`."""
