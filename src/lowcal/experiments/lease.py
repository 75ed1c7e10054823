"""What a worker holds while it trains one trial of a sweep."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.ledger import Ledger

if TYPE_CHECKING:
    from lowcal.training.epoch import Progress


class LostTrialError(Exception):
    """Another worker has taken the trial over."""


class Lease:
    """Keeps a trial while it is trained: gives signs of life, and passes on to a watcher what happens.

    Args:
        ledger: of the sweep.
        trial: its number there.
        watcher: is told what happens.

    Attributes:
        has_begun: whether the present run has got as far as training.
    """

    def __init__(self, ledger: Ledger, trial: int, watcher: Watcher) -> None:
        self.has_begun = False
        self._ledger, self._trial, self._watcher = ledger, trial, watcher
        self._ended = threading.Event()
        self._is_lost = False
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def note(self, text: str) -> None:
        """As `Watcher`."""
        self._watcher.note(text)

    def begin(self, arms: Sequence[Arm], finished: Sequence[int], epochs: int, *, later: int = 0) -> None:
        """As `Watcher`."""
        self.has_begun = True
        self._watcher.begin(arms, finished, epochs, later=later)

    def step(self, arm: Arm, progress: Progress) -> None:
        """As `Watcher`; ends the training if the trial is another worker's by now."""
        if self._is_lost or time.monotonic() - self._last > self._ledger.lease:
            raise LostTrialError
        self._watcher.step(arm, progress)

    def epoch(self, arm: Arm, record: Mapping[str, Any]) -> None:
        """As `Watcher`."""
        self._watcher.epoch(arm, record)
        if not self._ledger.progress(self._trial):
            raise LostTrialError

    def _beat(self) -> None:
        while not self._ended.wait(self._ledger.lease / 6):
            try:
                self._is_lost = not self._ledger.beat(self._trial)
                self._ledger.observe()
            except LowcalError:  # the storage does not answer; it may do so again before the lease is over
                continue
            if self._is_lost:
                return
            self._last = time.monotonic()
