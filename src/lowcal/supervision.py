"""The sign of local updates, from the training loss (Sec. 2.3, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from lowcal.settings import Settings

Sign = Literal["recomputed", "kept"]


class Supervision(Protocol):
    """Decides the sign of local updates in the next epoch."""

    def __call__(self, losses: tuple[float, ...]) -> Literal[-1, 1]:
        """The sign s, from the mean training loss of each epoch so far, oldest first."""
        ...


@dataclass(frozen=True)
class LossTrend(Settings):
    """Weak supervision: a rise of the training loss reverses the direction of local updates.

    Args:
        sign: "recomputed" after each epoch: -1 if the loss rose, else +1 (Algorithm 2). "kept": each rise reverses the
            direction, which is then "maintained" until the next rise (the prose of Sec. 2.3); it starts as +1.

    Example:
        >>> losses = (2.3, 1.9, 2.0, 1.8)
        >>> LossTrend()(losses), LossTrend(sign="kept")(losses)
        (1, -1)
    """

    sign: Sign = "recomputed"

    def __call__(self, losses: tuple[float, ...]) -> Literal[-1, 1]:
        """The sign in the coming epoch, from the mean training loss of each epoch so far."""
        rises = [before < after for before, after in pairwise(losses)]
        turns = sum(rises) if self.sign == "kept" else sum(rises[-1:])
        return -1 if turns % 2 else 1
