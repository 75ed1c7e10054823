"""Faults of file systems: a full one, and one for temporary files that is not the run's."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fault_trials.points import Point, limit_files
from fault_trials.runs import errors_of
from fault_trials.trials import Trials

MEMORY = Path("/dev/shm")  # a file system of its own on Linux
SAVING = "while the run's folder, a checkpoint or the weights are written"
FULL = "while the run's folder, a log line, a checkpoint or the weights are written"
LIMITED = (Point("creation", 5), Point("log", 4), Point("half", 2), Point("half", 20), Point("finish", 1))
FILLED = (Point("creation", 3), Point("log", 1), Point("half", 2), Point("half", 20), Point("finish", 1))
ELSEWHERE = (Point("creation", 4), Point("half", 1), Point("half", 9), Point("rename", 10), Point("finish", 1))
SMALL = 4 * 2**20  # bytes; a run here takes about a tenth of it


class CannotTryError(Exception):
    """This machine or user lacks what a trial needs; the text says what."""


def limited(trials: Trials, at: Point) -> bool:
    """Whether a run whose files may not grow any more from that point on says so, and then loses nothing."""
    return _is_said_and_costs_nothing(trials, trials.broken(at, limit_files, 2), lambda: None)


def full(trials: Trials, at: Point, disk: Path) -> bool:
    """The same of a run on a `disk` on which, at that point, no byte is left."""
    ballast = disk / "ballast"

    def fill() -> None:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    return _is_said_and_costs_nothing(trials, trials.broken(at, fill, 2, disk), ballast.unlink)


def elsewhere(trials: Trials, at: Point) -> bool:
    """Whether a run loses nothing that is killed there while temporary files go to another file system.

    Raises:
        CannotTryError: there is none.
    """
    if not os.access(MEMORY, os.W_OK) or MEMORY.stat().st_dev == trials.folder.stat().st_dev:
        raise CannotTryError(f"{MEMORY} is not another file system that can be written to")
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        try:
            os.environ["TMPDIR"], tempfile.tempdir = place, None
            return trials.kill(at) and not any(Path(place).iterdir())
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before


def _is_said_and_costs_nothing(trials: Trials, run: Path, mend: Callable[[], None]) -> bool:
    error = errors_of(run).read_text()
    debris = [path.name for path in run.iterdir() if path.name.startswith(".")] if run.exists() else []
    mend()
    return error.count("\n") == 1 and "cannot write" in error and not debris and trials.goes_on(run)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of `SMALL` bytes, mounted on `folder`.

    Raises:
        CannotTryError: this user may not mount one, or this system has none.
    """
    folder.mkdir(parents=True)
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
        ended = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotTryError("there is no mount command") from error
    if ended.returncode:
        raise CannotTryError(f"a tmpfs cannot be mounted: {ended.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
