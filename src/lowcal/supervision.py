"""The sign of local updates, from the training loss (Sec. 2.3, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from lowcal.errors import LowcalError


class Supervision(Protocol):
    """Decides the sign of local updates in the next epoch."""

    def __call__(self, losses: tuple[float, ...]) -> Literal[-1, 1]:
        """The sign s, from the mean training loss of each epoch so far, oldest first."""
        ...


@dataclass(frozen=True)
class LossTrend:
    """Weak supervision: a rise of the training loss reverses the direction of local updates.

    Args:
        sign: "recomputed" after each epoch: -1 if the loss rose, else +1 (Algorithm 2). "kept": each rise reverses the
            direction, which is then "maintained" until the next rise (the prose of Sec. 2.3); it starts as +1.

    Example:
        >>> losses = (2.3, 1.9, 2.0, 1.8)
        >>> LossTrend()(losses), LossTrend(sign="kept")(losses)
        (1, -1)
    """

    sign: Literal["recomputed", "kept"] = "recomputed"

    def __post_init__(self) -> None:
        if self.sign not in ("recomputed", "kept"):
            raise LowcalError(f"LossTrend: sign is {self.sign!r}; choose 'recomputed' or 'kept'")

    def __call__(self, losses: tuple[float, ...]) -> Literal[-1, 1]:
        """The sign in the coming epoch, from the mean training loss of each epoch so far."""
        rises = [before < after for before, after in pairwise(losses)]
        turns = sum(rises) if self.sign == "kept" else sum(rises[-1:])
        return -1 if turns % 2 else 1
