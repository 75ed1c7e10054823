"""Faults of storage: a full disk, temporary files on another file system, and damaged or hostile checkpoints."""

import hashlib
import io
import os
import pickle
import random
import signal
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .points import Point, kill, limit_files
from .runs import Tally, says

MEMORY = Path("/dev/shm")  # a file system of its own on Linux
SAVING = "while the run's folder, a checkpoint or the weights are written"
FULL = "while the run's folder, a log line, a checkpoint or the weights are written"
LIMITED = (Point("creation", 5), Point("log", 4), Point("half", 2), Point("half", 20), Point("finish", 1))
FILLED = (Point("creation", 3), Point("log", 1), Point("half", 2), Point("half", 20), Point("finish", 1))
ELSEWHERE = (Point("creation", 4), Point("half", 1), Point("half", 9), Point("rename", 10), Point("finish", 1))
SMALL = 4 * 2**20  # bytes; a run here takes about a tenth of it


class CannotTryError(Exception):
    """This machine or user lacks what a trial needs; the text says what."""


def limited(trials, at):
    """Whether a run whose files may not grow from that point on says so, and then loses nothing."""
    return _is_said_and_costs_nothing(trials, trials.broken(at, limit_files, 2), lambda: None)


def full(trials, at, disk):
    """The same for a run on a `disk` that is full at that point."""
    ballast = disk / "ballast"

    def fill():
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    return _is_said_and_costs_nothing(trials, trials.broken(at, fill, 2, disk), ballast.unlink)


def elsewhere(trials, at):
    """Whether a run that is killed there loses nothing if temporary files go to another file system."""
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


def _is_said_and_costs_nothing(trials, run, repair):
    said = says(run, "cannot write")
    debris = [path.name for path in run.iterdir() if path.name.startswith(".")] if run.exists() else []
    repair()
    return said and not debris and trials.goes_on(run)


@contextmanager
def small_disk(folder):
    """A file system of `SMALL` bytes, mounted on `folder`; CannotTryError if this user may not mount one."""
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


class Trap:
    """Makes the file `path` as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage(trials, *, truncations, flips):
    """Damage the newest checkpoint of a killed run; the one before must be taken, and nothing of the damaged one."""
    from lowcal.training.checkpoint import PRESENT, PREVIOUS, load_checkpoint

    run = trials.broken(Point("step", 10), kill, -signal.SIGKILL)
    whole = (run / PRESENT).read_bytes()
    generator = random.Random(0)

    def is_passed_over(content):
        (run / PRESENT).write_bytes(content)
        checkpoint = load_checkpoint(run)
        return checkpoint is not None and checkpoint.path == run / PREVIOUS and len(checkpoint.skipped) == 1

    cut = Tally("checkpoint truncated", "at a random length")
    for length in generator.sample(range(len(whole)), truncations):
        cut.note(is_passed_over(whole[:length]))
    flipped = Tally("checkpoint with one bit flipped", "a random bit")
    for _ in range(flips):
        content = bytearray(whole)
        content[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        flipped.note(is_passed_over(bytes(content)))
    hostile = Tally("malicious pickle in place of a checkpoint", "bare, by torch.save, each with and without checksum")
    trap = trials.folder / "sprung"
    saved = io.BytesIO()
    torch.save({"format": 2, "model": Trap(trap)}, saved)
    for content in (pickle.dumps(Trap(trap)), saved.getvalue()):
        header = f"lowcal-checkpoint {hashlib.sha256(content).hexdigest()} {len(content)}\n".encode()
        for file in (content, header + content):
            hostile.note(is_passed_over(file) and not trap.exists())
    strange = Tally("checkpoint of another network", "in place of both")
    other = trials.folder / "other"
    trials.start(other, *trials.more, "--set", "model.width=8")
    stays = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".pt"}
    for name in (PRESENT, PREVIOUS):
        (run / name).write_bytes((other / PRESENT).read_bytes())
    code = trials.start(run, "--resume")
    same_files = stays == {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".pt"}
    strange.note(code == 2 and says(run, "is of another run") and same_files)
    return [cut, flipped, hostile, strange]
