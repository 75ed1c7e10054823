"""A process beside this one that ends it if a signal is not heeded in time.

Python runs signal handlers between two instructions of the main thread, so that a call into native code that hangs
delays them for ever. The C part of a handler runs at once: it writes the signal's number to `signal.set_wakeup_fd`,
whose other end the watchdog reads. When time is over, the watchdog sends the exit code to a thread of this process,
which exits with it. If native code holds the GIL too, no thread can run, and the watchdog sends SIGKILL.

This file is also the watchdog's program. It imports the standard library alone, and little of that at its start.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from contextlib import suppress

# SIGTERM is what schedulers and `kill` send; SIGUSR1 is what SLURM can be told to send some time before it.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same again later will do
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
IS_POSSIBLE = hasattr(os, "fork")  # elsewhere a pipe cannot be waited for, and there is no SIGKILL

_ALIVE = 0  # no signal has this number
_SECOND = 1.0  # seconds after a second Ctrl-C, in which Python may still come to its handler
_LAST = 1.0  # seconds for the thread that exits


class Watchdog:
    """Watches this process from its construction, in the main thread, to `close`.

    Args:
        grace: seconds from a signal, or from `renew` after one, to the end of this process; infinite: for ever.
        folder: where this process writes.
        advice: how to go on with what is in `folder`, for the line on standard error; empty: no line.
    """

    def __init__(self, grace: float, folder: str, advice: str) -> None:
        import subprocess
        import threading

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
        self._thread = threading.Thread(target=self._obey, daemon=True)
        self._thread.start()
        _watching.append(self)

    def renew(self) -> None:
        """Gives a signal that has come a new `grace` from now on."""
        with suppress(OSError):  # the watchdog was killed
            os.write(self._to.fileno(), bytes([_ALIVE]))

    def close(self) -> None:
        """Ends the watchdog."""
        _watching.remove(self)
        signal.set_wakeup_fd(self._before)
        self._to.close()
        self._process.wait()
        self._thread.join()
        self._from.close()

    def leave(self) -> None:
        """In a forked child: what it receives is none of the watchdog's business."""
        signal.set_wakeup_fd(-1)
        self._to.close()
        self._from.close()

    def _obey(self) -> None:
        code = os.read(self._from.fileno(), 1)
        if code:
            os._exit(code[0])


_watching: list[Watchdog] = []


def _leave_all() -> None:
    while _watching:
        _watching.pop().leave()


if IS_POSSIBLE:
    os.register_at_fork(after_in_child=_leave_all)


def _watch(process: int, grace: float, folder: str, advice: str) -> None:
    """The watchdog's program: returns when `process` has closed the pipe or is ended."""
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
        _say("" if by_ctrl_c else f" by {signal.Signals(first).name}", is_second, grace, folder, advice)
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


def _say(by: str, is_second: bool, grace: float, folder: str, advice: str) -> None:
    why = "" if is_second else f", since the step took longer than checkpoint.grace, {grace:g} s"
    is_written = os.path.isdir(folder) and os.listdir(folder)
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # which live lines hide
    line = f"{cursor}lowcal: stopped{by} without saving{why}; {advice if is_written else 'nothing was written'}\n"
    with suppress(OSError):
        os.write(2, line.encode(errors="replace"))


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4])
