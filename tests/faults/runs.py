"""Small runs of `lowcal train`, each in a process of its own, and trials: a fault in a run, which is then resumed."""

import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass

import torch

from ..support import same
from ..world import processes
from .points import hang, hang_with_the_gil, kill, plant, terminate

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
WORKERS = (  # files decoded in this number of processes
    "data={{name: imagenet, image_size: 32, workers: {}, train_images: null, test_images: null, classes: 4}}"
)


def train(folder, *more, fault=None, at=None):
    """`lowcal train` in a process of its own; its exit code, or less than 0 for the signal that ended it."""
    arguments = ["train", "--quiet", "--device", "cpu", "--out", str(folder), *more]
    process = processes().Process(target=_child, args=(arguments, errors_of(folder), fault, at))
    process.start()
    process.join()
    return process.exitcode or 0


def _child(arguments, errors, fault, at):
    from lowcal.cli import main

    torch.set_num_threads(1)
    with errors.open("w") as file, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = nothing, file
        if fault is not None:
            plant(fault, at)
        code = main(arguments)
        file.flush()
    os._exit(code)


def errors_of(folder):
    """The file with what the last process of a run wrote to standard error; not on a disk mounted for trials."""
    place = folder.parent
    while place.is_mount():
        place = place.parent
    return place / f"{folder.name}.err"


def options(*more):
    """The settings as options of the command; later ones win."""
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


def image_files(folder):
    """Write 64 images to train on and 32 to evaluate on; return the options that read them."""
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


def outcome(folder):
    """Everything in a run folder that must not depend on faults; times are left out."""
    from lowcal.training.checkpoint import load_checkpoint

    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "weights": torch.load(folder / "model.pt", weights_only=True),
        "safetensors": (folder / "model.safetensors").read_bytes(),
        "checkpoint": _untimed(load_checkpoint(folder).state),
        "log": [_untimed(json.loads(line)) for line in (folder / "epochs.jsonl").read_text().splitlines()],
        "summary": _untimed(json.loads((folder / "summary.json").read_text())),
    }


def _untimed(value):
    if isinstance(value, dict):
        return {key: _untimed(entry) for key, entry in value.items() if key not in TIMES}
    return value


@dataclass
class Tally:
    """A row of the table: a kind of fault, the number of trials, and of those that lost nothing."""

    fault: str
    where: str
    tried: int = 0
    recovered: int = 0
    slowest_exit: float | None = None  # seconds from the signal to the end of the process

    def note(self, recovered):
        self.tried += 1
        self.recovered += recovered


class Trials:
    """Faults, each in a run of its own under `folder`, compared with an uninterrupted run.

    `more` are options of `lowcal train` beyond the settings. The file of a run's errors lies beside its folder.
    """

    def __init__(self, folder, *more):
        for module in ("lowcal.experiments.train", "torch._dynamo"):  # loaded once, not in each process
            importlib.import_module(module)
        folder.mkdir(exist_ok=True)
        self.folder, self.more = folder, more
        self._count = 0
        if self.undisturbed(folder / "whole"):
            raise RuntimeError("the run without a fault has failed")
        self.whole = outcome(folder / "whole")

    def undisturbed(self, run):
        """A run in this process, from which the others are forked with all that it has loaded."""
        from lowcal.cli import main

        return main(["train", "--quiet", "--device", "cpu", "--out", str(run), *self.more])

    def start(self, run, *more, fault=None, at=None, **options):
        return train(run, *more, fault=fault, at=at, **options)

    def new(self, at, place=None):
        self._count += 1
        return (place or self.folder) / f"{at.place}-{at.number}-{self._count}"

    def is_whole(self, run):
        """Whether the run ended like the uninterrupted one, and left no other file in its folder."""
        return same(outcome(run), self.whole)

    def broken(self, at, fault, code, place=None):
        """The folder, in `place`, of a run that met `fault`; `code` is the exit code that its process must have."""
        run = self.new(at, place)
        ended = self.start(run, *self.more, fault=fault, at=at)
        if ended != code:
            raise RuntimeError(f"{at}: ended with {ended}, not {code}: {errors_of(run).read_text()}")
        return run

    def goes_on(self, run):
        """Whether the run, resumed, ends like the uninterrupted one; without a run folder it is started again."""
        from lowcal.training.run_folder import RunFolder

        data = self.more[self.more.index("--data-dir") :] if "--data-dir" in self.more else ()
        more = ("--resume", *data) if RunFolder.holds_run(run) else self.more
        return self.start(run, *more) == 0 and self.is_whole(run)

    def kill(self, at):
        """Whether a run that is killed at that point loses nothing."""
        return self.goes_on(self.broken(at, kill, -signal.SIGKILL))

    def stamped(self):
        """SIGTERM, with the time at which it came in a file."""
        (self.folder / "signalled").write_text(repr(time.time()))
        terminate()

    def seconds_since_signal(self):
        return time.time() - float((self.folder / "signalled").read_text())

    def terminate(self, at):
        """Whether a run that gets SIGTERM at that point ends with 75 and loses nothing; the seconds that it took."""
        run = self.broken(at, self.stamped, 75)
        seconds = self.seconds_since_signal()
        return says(run, "stopped by SIGTERM; go on with: lowcal train") and self.goes_on(run), seconds

    def hang(self, at, *, with_the_gil):
        """Whether a run that hangs in native code and gets SIGTERM is ended from outside and loses nothing."""
        fault, code = (hang_with_the_gil, -signal.SIGKILL) if with_the_gil else (hang, 75)
        run = self.broken(at, fault, code)
        return says(run, "stopped by SIGTERM without saving", "go on with: lowcal train") and self.goes_on(run)


def says(run, *texts):
    """Whether the run wrote one line to standard error, with these texts in it."""
    error = errors_of(run).read_text()
    return error.count("\n") == 1 and all(text in error for text in texts)
