"""What ends a process whose main thread does not come to its signal handlers; each case is a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

HEAD = """
import ctypes, os, signal, sys, time
from lowcal.training.signals import Interrupted, catch_signals, deferred, renew_grace, requested

def hang(library):
    # A mutex that is locked already: no signal ends the waiting for it.
    lock = ctypes.create_string_buffer(256)
    library(None).pthread_mutex_lock(lock)
    library(None).pthread_mutex_lock(lock)

def say(text):
    print(text, flush=True)
"""


def start(body: str) -> subprocess.Popen[str]:
    """A process that has said 'ready'."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def watchdogs(process: subprocess.Popen[str]) -> list[int]:
    """The process's children."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    """Whether all of the processes end; a watchdog does when it sees that its pipe is closed."""
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.01)
    return True


# In "CDLL" the GIL is released, in "PyDLL" it is held.
HANGING = """
with catch_signals({grace}, folder="/", advice="{advice}"), deferred():
    say("ready")
    hang(ctypes.{library})
"""


@pytest.mark.parametrize(
    ("library", "number", "code"),
    [("CDLL", "SIGTERM", 75), ("CDLL", "SIGUSR1", 75), ("CDLL", "SIGINT", 130), ("PyDLL", "SIGTERM", -signal.SIGKILL)],
)
def test_a_signal_that_waits_longer_than_the_grace_ends_the_process(library, number, code):
    process = start(HANGING.format(grace=0.2, advice="go on", library=library))
    watching = watchdogs(process)
    assert len(watching) == 1
    process.send_signal(getattr(signal, number))
    _, said = process.communicate()
    assert process.returncode == code
    by = "" if number == "SIGINT" else f" by {number}"
    why = "since the step took longer than checkpoint.grace, 0.2 s"
    assert said == f"lowcal: stopped{by} without saving, {why}; go on\n"
    assert gone(watching)


@pytest.mark.parametrize(("library", "first"), [("CDLL", "SIGINT"), ("PyDLL", "SIGTERM")])
def test_a_second_ctrl_c_does_not_wait_for_the_grace(library, first):
    process = start(HANGING.format(grace=1e6, advice="go on", library=library))
    process.send_signal(getattr(signal, first))
    time.sleep(0.3)  # two at the same moment are one
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == (130 if library == "CDLL" else -signal.SIGKILL)
    assert said == "lowcal: stopped without saving; go on\n"


def test_nothing_is_said_where_another_process_speaks_or_nothing_was_written(tmp_path):
    process = start(HANGING.format(grace=0.1, advice="", library="CDLL"))
    process.terminate()
    assert process.communicate()[1] == ""
    process = start(HANGING.format(grace=0.1, advice="go on", library="CDLL").replace('"/"', repr(str(tmp_path))))
    process.terminate()
    assert process.communicate()[1].endswith("; nothing was written\n")


def test_a_process_that_heeds_its_signal_is_left_alone():
    process = start(
        """
try:
    with catch_signals(0.5), deferred():
        say("ready")
        while not requested():
            time.sleep(0.01)
        for _ in range(8):  # longer than the grace, which each saving has anew
            time.sleep(0.2)
            renew_grace()
        raise Interrupted(requested())
except Interrupted as error:
    time.sleep(1)  # nobody watches any more
    say(error.signal.name)
"""
    )
    process.terminate()
    assert process.communicate() == ("SIGTERM\n", "")
    assert process.returncode == 0


def test_without_a_signal_nothing_ends_a_process_and_the_watchdog_goes_with_it():
    process = start(HANGING.format(grace=0.01, advice="go on", library="PyDLL"))
    watching = watchdogs(process)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    assert process.communicate() == ("", "")
    assert len(watching) == 1
    assert gone(watching)


def test_what_a_forked_child_receives_is_its_own_business():
    process = start(
        """
with catch_signals(0.2), deferred():
    child = os.fork()
    if not child:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT) if not requested() else None
        time.sleep(1)
        os._exit(int(signal.set_wakeup_fd(-1) != -1))
    say("ready")
    _, status = os.waitpid(child, 0)
    say(os.waitstatus_to_exitcode(status))
"""
    )
    assert process.communicate() == ("0\n", "")
    assert process.returncode == 0


def test_it_leaves_no_child_no_descriptor_and_the_wakeup_descriptor_that_was_there():
    process = start(
        """
before = sorted(os.listdir("/proc/self/fd"))
reading, writing = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(writing)
for _ in range(3):
    with catch_signals():
        pass
assert signal.set_wakeup_fd(-1) == writing
os.close(reading), os.close(writing)
assert sorted(os.listdir("/proc/self/fd")) == before
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    say("ready")
"""
    )
    assert process.communicate() == ("", "")
