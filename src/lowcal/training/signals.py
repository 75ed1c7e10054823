"""Signals that end a run, and the watchdog: a process that ends this one if it does not react to a signal in time.

In training a signal waits for the end of the step, so that the run can be saved. Python runs signal handlers between
two instructions of the main thread, so a call into native code that hangs delays them for ever. The C part of a handler
runs at once: it writes the signal's number to `signal.set_wakeup_fd`, whose other end the watchdog reads. When the time
is over, the watchdog sends the exit code to a thread of this process, which exits with it. If native code also holds
the GIL, no thread can run, and the watchdog sends SIGKILL.

This file is also the watchdog's program. It imports only the standard library, and little of it.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# SIGTERM is what schedulers and `kill` send. SLURM can be told to send SIGUSR1 some time before it.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command can be run again later
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
HAS_WATCHDOG = hasattr(os, "fork")  # elsewhere select cannot wait for a pipe, and there is no SIGKILL

_ALIVE = 0  # no signal has this number
_SECOND = 1.0  # seconds from a second Ctrl-C to the end, in which Python may still run its handler
_LAST = 1.0  # seconds for the thread that exits


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; `signal` says which."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class _Handler:
    """The handler of all signals in this process, and its state."""

    received: int | None = None
    deferred = 0  # how many `deferred` contexts are entered
    is_ignoring = False
    watchdog: Watchdog | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_second_ctrl_c = number == signal.SIGINT and self.received is not None
        if self.deferred and not is_second_ctrl_c:
            self.received = self.received or number
            return
        raise Interrupted(number)


_handler = _Handler()


@contextmanager
def catch_signals(grace: float = 30.0, *, folder: str = "", advice: str = "") -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGUSR1 raise `Interrupted`, at once or as `deferred` says.

    A `Watchdog`, whose arguments these are, ends a process in which that does not happen. Only the main thread can set
    handlers; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handler.received, _handler.is_ignoring = None, False
    _handler.watchdog = Watchdog(grace, folder, advice) if HAS_WATCHDOG else None
    before = {number: signal.signal(number, _handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items() if not _handler.is_ignoring else ():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _handler.received = None
        if _handler.watchdog is not None:
            _handler.watchdog.close()
            _handler.watchdog = None


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal waits, and `requested` returns it; a second Ctrl-C does not wait."""
    _handler.deferred += 1
    try:
        yield
    finally:
        _handler.deferred -= 1


def requested() -> int:
    """The number of the signal that waits; 0 if none does."""
    return _handler.received or 0


def renew_grace() -> None:
    """Gives a signal that waits its whole `grace` again, because the program has begun to save."""
    if _handler.watchdog is not None:
        _handler.watchdog.renew()


def ignore_signals() -> None:
    """From now on signals do nothing: the program is ending, and they must not suppress its last message."""
    _handler.is_ignoring = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Watchdog:
    """Watches this process from its construction, in the main thread, until `close`.

    Args:
        grace: seconds from a signal, or from `renew` after one, to the end of this process; infinite: no limit.
        folder: where this process writes.
        advice: how to continue the run in `folder`, for the line on standard error; empty: no line.
    """

    def __init__(self, grace: float, folder: str, advice: str) -> None:
        import subprocess

        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace), folder, advice]
        # A session of its own: Ctrl-C in a terminal must not reach it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        os.set_blocking(self._to.fileno(), False)
        self._before = signal.set_wakeup_fd(self._to.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._exit_when_told, daemon=True)
        self._thread.start()
        _watchdogs.append(self)

    def renew(self) -> None:
        """Gives a signal that has come a new `grace`, from now."""
        with suppress(OSError):  # the watchdog was killed
            os.write(self._to.fileno(), bytes([_ALIVE]))

    def close(self) -> None:
        """Ends the watchdog."""
        _watchdogs.remove(self)
        signal.set_wakeup_fd(self._before)
        self._to.close()
        self._process.wait()
        self._thread.join()
        self._from.close()

    def detach(self) -> None:
        """In a forked child: its signals do not concern the watchdog."""
        signal.set_wakeup_fd(-1)
        self._to.close()
        self._from.close()

    def _exit_when_told(self) -> None:
        code = os.read(self._from.fileno(), 1)
        if code:
            os._exit(code[0])


_watchdogs: list[Watchdog] = []


def _detach_all() -> None:
    while _watchdogs:
        _watchdogs.pop().detach()


if HAS_WATCHDOG:
    os.register_at_fork(after_in_child=_detach_all)


def _watch(process: int, grace: float, folder: str, advice: str) -> None:
    """The watchdog's program: returns when `process` has closed the pipe or has been ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    first, is_second, end = 0, False, math.inf
    while _has_input(end):
        received = os.read(0, 4096)
        if not received:
            return
        for number in received:
            if number == signal.SIGINT and first:
                is_second, end = True, min(end, time.monotonic() + _SECOND)
            elif number in SIGNALS and not first:
                first, end = number, time.monotonic() + grace
            elif number == _ALIVE and first and not is_second:
                end = time.monotonic() + grace
    by_ctrl_c = is_second or first == signal.SIGINT
    if advice:
        _report("" if by_ctrl_c else f" by {signal.Signals(first).name}", is_second, grace, folder, advice)
    os.write(1, bytes([INTERRUPTED if by_ctrl_c else PREEMPTED]))
    end = time.monotonic() + _LAST
    while _has_input(end):
        if not os.read(0, 4096):
            return
    os.kill(process, signal.SIGKILL)


def _has_input(end: float) -> bool:
    """Whether something can be read before the time `end`."""
    timeout = None if math.isinf(end) else max(0.0, end - time.monotonic())
    return bool(select.select([0], [], [], timeout)[0])


def _report(by: str, is_second: bool, grace: float, folder: str, advice: str) -> None:
    why = "" if is_second else f", since the step took longer than checkpoint.grace, {grace:g} s"
    is_written = os.path.isdir(folder) and os.listdir(folder)
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # shows the cursor, which live lines hide
    line = f"{cursor}lowcal: stopped{by} without saving{why}; {advice if is_written else 'nothing was written'}\n"
    with suppress(OSError):
        os.write(2, line.encode(errors="replace"))


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4])
