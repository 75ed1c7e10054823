"""The sign of local updates, from the training loss (Sec. 2.3, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


class Supervision(Protocol):
    """Tells the sign of local updates in the coming epoch."""

    def __call__(self, losses: tuple[float, ...]) -> Literal[-1, 1]:
        """The sign s, from the mean training loss of each epoch so far, the last one last."""
        ...


@dataclass(frozen=True)
class LossTrend:
    """Weak supervision: local updates turn round in an epoch before which the training loss rose (Algorithm 2).

    Example:
        >>> LossTrend()((2.3, 1.9, 2.0))
        -1
    """

    def __call__(self, losses: tuple[float, ...]) -> Literal[-1, 1]:
        """-1 if the last loss is above the one before it, else +1."""
        return -1 if len(losses) > 1 and losses[-2] < losses[-1] else 1
