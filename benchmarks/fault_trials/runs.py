"""Small runs of `lowcal train`, each in a process of its own, and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fault_trials.points import Point, plant

TIMES = {"seconds", "total_seconds", "step_ms", "images_per_second", "times", "part"}
EPOCHS = 4  # of four steps
SETTINGS = (
    f"epochs={EPOCHS}",
    "batch=16",
    "model.width=4",
    "data={name: synthetic, train_images: 64, test_images: 520, image_size: 8, classes: 4}",
    "local.schedule={name: fixed, epochs: {1: 3, 3: 6}}",
    "checkpoint.minutes=1e-9",
)
WORKERS = (  # files decoded in so many processes
    "data={{name: imagenet, image_size: 32, workers: {}, train_images: null, test_images: null, classes: 4}}"
)


def train(folder: Path, *more: str, fault: Callable[[], None] | None = None, at: Point | None = None) -> int:
    """`lowcal train` in a process of its own; its exit code, or less than 0 for the signal that ended it.

    What it says on standard error is in the file `errors_of` gives.
    """
    arguments = ["train", "--quiet", "--device", "cpu", "--out", str(folder), *more]
    context = multiprocessing.get_context("fork")  # torch is loaded already
    process = context.Process(target=_child, args=(arguments, errors_of(folder), fault, at))
    process.start()
    process.join()
    return int(process.exitcode or 0)


def errors_of(folder: Path) -> Path:
    """The file with what the last process said on standard error; it is not on a disk mounted for trials."""
    place = folder.parent
    while place.is_mount():
        place = place.parent
    return place / f"{folder.name}.err"


def options(*more: str) -> list[str]:
    """The settings as options of the command; later ones win."""
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


def image_files(folder: Path) -> list[str]:
    """Makes 64 images to train on and 32 to evaluate on; gives the options that read them."""
    from torchvision.io import write_png

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 8)):
        for label in "abcd":
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (3, 40, 36), generator=generator, dtype=torch.uint8)
                write_png(pixels, str(place / f"{index}.png"))
    return ["--data-dir", str(folder)]


def outcome(folder: Path) -> dict[str, Any]:
    """All that may not depend on faults."""
    from lowcal.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    return {
        "weights": torch.load(folder / "model.pt", weights_only=True),
        "safetensors": (folder / "model.safetensors").read_bytes(),
        "checkpoint": _untimed(checkpoint.state),
        "log": [_untimed(json.loads(line)) for line in (folder / "epochs.jsonl").read_text().splitlines()],
        "summary": _untimed(json.loads((folder / "summary.json").read_text())),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two outcomes are bitwise equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(entry) for key, entry in value.items() if key not in TIMES}
    return value


def _child(arguments: list[str], errors: Path, fault: Callable[[], None] | None, at: Point | None) -> None:
    from lowcal.cli import main

    torch.set_num_threads(1)
    with errors.open("w") as file, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = nothing, file
        if fault is not None and at is not None:
            plant(fault, at)
        code = main(arguments)
        file.flush()
    os._exit(code)
