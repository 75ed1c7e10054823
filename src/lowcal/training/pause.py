"""What may come between two steps of a run: its saving, and its end by a signal."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import NoReturn

from lowcal.training.interrupt import Interrupted, end, requested
from lowcal.training.ranks import Ranks


class SavingPause:
    """The `Pause` between steps in which a run saves, because it is time or because a signal came.

    Args:
        ranks: the processes that train the network.
        every: seconds from one saving to the next.
        save: saves the run.
    """

    def __init__(self, ranks: Ranks, every: float, save: Callable[[], None]) -> None:
        self._ranks, self._every, self._save = ranks, every, save
        self._last = monotonic()
        self._signal = 0
        self._is_alone = False

    def is_due(self) -> bool:
        """Whether it is time, or a signal came to one of the processes."""
        self._signal = self._ranks.poll(requested())
        return self._signal > 0 or monotonic() - self._last >= self._every

    def is_urgent(self) -> bool:
        """Whether a signal came to this process."""
        self._is_alone = requested() > 0  # the other processes do not know
        return self._is_alone

    def __call__(self) -> None:
        """Saves, and ends the run if a signal came."""
        self._save()
        if self._signal:
            stop(self._signal, self._ranks)
        if self._is_alone:
            raise Interrupted(requested())
        self._last = monotonic()


def stop(signal: int, ranks: Ranks) -> NoReturn:
    """Ends a run, which is saved, as all processes have agreed."""
    if ranks.world > 1:
        ranks.wait()  # for the main one, which saves
        end()  # torchrun sends a signal to those that are still there when the first has gone
    raise Interrupted(signal)
