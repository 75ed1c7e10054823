"""Damaged, hostile and strange checkpoints."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import torch

from fault_trials.points import Point, kill
from fault_trials.runs import errors_of, train
from fault_trials.trials import Tally, Trials


class Trap:
    """Makes the file `path` as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damage(trials: Trials, *, truncations: int, flips: int) -> list[Tally]:
    """Damages the newest checkpoint of a killed run; the one before must be taken, and nothing of the damaged one."""
    from lowcal.training.checkpoint import PRESENT, PREVIOUS, load_checkpoint

    run = trials.broken(Point("step", 10), kill, -signal.SIGKILL)
    whole = (run / PRESENT).read_bytes()
    generator = random.Random(0)

    def is_passed_over(content: bytes) -> bool:
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
        header = b"lowcal-checkpoint %s %d\n" % (hashlib.sha256(content).hexdigest().encode(), len(content))
        for file in (content, header + content):
            hostile.note(is_passed_over(file) and not trap.exists())
    strange = Tally("checkpoint of another network", "in place of both")
    other = trials.folder / "other"
    train(other, *trials.more, "--set", "model.width=8")
    stays = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".pt"}
    for name in (PRESENT, PREVIOUS):
        (run / name).write_bytes((other / PRESENT).read_bytes())
    code, error = train(run, "--resume"), errors_of(run).read_text()
    same_files = stays == {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".pt"}
    strange.note(code == 2 and error.count("\n") == 1 and "is of another run" in error and same_files)
    return [cut, flipped, hostile, strange]
