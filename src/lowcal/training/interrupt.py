"""Signals that end a run: in training they wait for the end of the step, so that what was done can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lowcal.training.watchdog import IS_POSSIBLE, SIGNALS, Watchdog


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; `signal` says which."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class _Desk:
    """Where signals arrive: there is one in a process, as there is one handler for each signal."""

    received: int | None = None
    deferred = 0  # how many `deferred` are entered
    is_ending = False
    watchdog: Watchdog | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        is_impatient = number == signal.SIGINT and self.received is not None  # a second Ctrl-C
        if self.deferred and not is_impatient:
            self.received = self.received or number
            return
        raise Interrupted(number)


_desk = _Desk()


@contextmanager
def catch_signals(grace: float = 30.0, *, folder: str = "", advice: str = "") -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGUSR1 raise `Interrupted`, at once or as `deferred` says.

    A process in which that does not happen is ended by a `Watchdog`, whose arguments these are. Only the main thread
    can set handlers; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _desk.received, _desk.is_ending = None, False
    _desk.watchdog = Watchdog(grace, folder, advice) if IS_POSSIBLE else None
    before = {number: signal.signal(number, _desk.receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items() if not _desk.is_ending else ():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _desk.received = None
        if _desk.watchdog is not None:
            _desk.watchdog.close()
            _desk.watchdog = None


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal waits, and `requested` tells of it; a second Ctrl-C does not wait."""
    _desk.deferred += 1
    try:
        yield
    finally:
        _desk.deferred -= 1


def renew_grace() -> None:
    """Gives a signal that waits its whole `grace` once more, since the program has come to its saving."""
    if _desk.watchdog is not None:
        _desk.watchdog.renew()


def requested() -> int:
    """The number of the signal that waits; 0 if none does."""
    return _desk.received or 0


def end() -> None:
    """From here on signals do nothing, since the program is ending: none may come between it and its last words."""
    _desk.is_ending = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
