"""What runs and who watches: the arms of an experiment, and the interface through which progress is shown."""

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
        variant: names the settings in which it differs from the experiment's other runs of its method; "" for none.
        epochs: its epochs where they differ from the other arms'.
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
    """Is told what happens, as it happens; `lowcal.console` shows it on a terminal."""

    def note(self, text: str) -> None:
        """Something worth a line, such as a run that is taken up again."""

    def begin(self, arms: Sequence[Arm], finished: Sequence[int], epochs: int, *, later: int = 0) -> None:
        """The arms that run from here on in turn, and the epochs that each has behind it.

        Each has `epochs` epochs unless it says otherwise; `later` epochs of other arms come after these.
        """

    def step(self, arm: Arm, progress: Progress) -> None:
        """A sign of life within an epoch."""

    def epoch(self, arm: Arm, record: Mapping[str, Any]) -> None:
        """An epoch has ended; `record` is its line in `epochs.jsonl`."""
