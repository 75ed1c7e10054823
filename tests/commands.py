"""Small runs of the command, in this process or in one forked from it, and the mistakes that end them."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from lowcal.cli import main
from lowcal.training.run import Run

from .world import processes

# A network and images small enough for a test: 64 images, 2 epochs, four steps each.
SMALL = [
    "epochs=2",
    "batch=16",
    "model.width=4",
    "data={name: synthetic, train_images: 64, test_images: 32, image_size: 8, classes: 4}",
    "local.schedule={name: fixed, epochs: {1: 3}}",
]
IMAGES = ["--set", "data={name: image-folder, image_size: 8}", "--set", "batch=2", "--set", "epochs=1"]


def small(*settings: str) -> list[str]:
    return [part for setting in (*SMALL, *settings) for part in ("--set", setting)]


def folders(root: Path, classes: dict[str, int]) -> Path:
    """Image folders of so many images of each class."""
    for part in ("train", "test"):
        for label, count in classes.items():
            (root / part / label).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (index * 10, 40, 90)).save(root / part / label / f"{index}.png")
    return root


def broken(root: Path) -> Path:
    """The same with a file that is no image."""
    folders(root, {"cat": 4, "dog": 4})
    (root / "train" / "cat" / "2.png").write_bytes(b"not an image at all")
    return root


def lines(path: Path) -> list[dict]:
    """The records of a run without the times in them."""
    timed = {"seconds", "total_seconds", "step_ms", "images_per_second"}
    records = [json.loads(line) for line in (path / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 2 and one line with `expected` in it."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowcal: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert expected in error


def interrupted(arguments: list[str], epochs: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """`main`, with Ctrl-C in the first epoch after `epochs` epochs of all runs together."""
    whole = Run.run_epoch
    left = [epochs]

    def run_epoch(run, progress=None):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(run, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "run_epoch", run_epoch)
        return main(arguments)


def signalled(arguments: list[str], number: int, after: str) -> tuple[int, str]:
    """The exit code and standard error of a process whose command gets a signal when it has printed `after`."""
    with tempfile.TemporaryDirectory() as place:
        process, output = started(arguments, place), Path(place) / "out"
        while process.is_alive() and not (output.exists() and after in output.read_text()):
            time.sleep(0.005)
        os.kill(process.pid, number)
        return ended(process, place)


def into_a_closed_pipe(arguments: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a process whose command prints to nobody."""
    with tempfile.TemporaryDirectory() as place:
        return ended(started(arguments, place, listens=False), place)


def started(arguments, place, *, listens=True):
    """The command in a process forked from this one, in which torch is loaded."""
    process = processes().Process(target=_command, args=(arguments, Path(place), listens))
    process.start()
    return process


def ended(process, place):
    process.join()
    return process.exitcode, (Path(place) / "err").read_text()


def _command(arguments, place, listens):
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(os.open(place / "out", os.O_WRONLY | os.O_CREAT) if listens else writing, 1)
    os.dup2(os.open(place / "err", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)
