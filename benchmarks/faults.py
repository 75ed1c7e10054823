"""Faults on purpose: runs that are killed, stopped or starved at chosen points must end as if nothing had happened.

    python benchmarks/faults.py                # all of them, minutes; writes results/faults.json

Each run is a process of its own that trains a small network by local learning over two moves of the boundary, saving
after each step. What is compared with an uninterrupted run, bit for bit: weights, optimizer, every random state, log
lines and summary; times are left out.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowcal.training.record import write_json

RESULT = Path(__file__).parents[1] / "results" / "faults.json"
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
    "data={{name: imagenet, image_size: 32, workers: {}, train_images: null, test_images: null, classes: null}}"
)


@dataclass(frozen=True)
class Point:
    """Where in a run a fault comes: the `number`-th time, counted from 1, that `place` is reached."""

    place: str
    number: int


PLACES = {
    "step": "in a step, before the optimizer",
    "evaluation": "in evaluation",  # three batches of it in an epoch
    "move": "at an epoch's end, before the boundary moves",
    "record": "between log line and checkpoint",
    "half": "with half a checkpoint written",
    "rename": "between the renames of a checkpoint",
}
SHORT = (Point("step", 7), Point("move", 3), Point("evaluation", 5), Point("half", 12))
FILES = (*SHORT[:2], Point("evaluation", 2), SHORT[3])  # with so few images evaluation is one batch
LONG = (
    *(Point("step", number) for number in (1, 4, 5, 10, 13, 16)),
    *(Point("evaluation", number) for number in (1, 6, 11)),
    *(Point("move", number) for number in (1, 2, 4)),
    *(Point("record", number) for number in (1, 3)),
    *(Point("half", number) for number in (1, 9, 20)),
    *(Point("rename", number) for number in (2, 10, 19)),
)


def kill() -> None:
    """The process ends at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """What a scheduler sends."""
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    """No file may grow over 1,000 bytes from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def train(folder: Path, *more: str, fault: Callable[[], None] | None = None, at: Point | None = None) -> int:
    """`lowcal train` in a process of its own; its exit code, or less than 0 for the signal that ended it.

    What it says on standard error is in the file beside `folder` whose name ends in .err.
    """
    arguments = ["train", "--quiet", "--device", "cpu", "--out", str(folder), *more]
    context = multiprocessing.get_context("fork")  # torch is loaded already
    process = context.Process(target=_child, args=(arguments, errors_of(folder), fault, at))
    process.start()
    process.join()
    return int(process.exitcode or 0)


def errors_of(folder: Path) -> Path:
    """The file with what the last process said on standard error."""
    return folder.with_name(f"{folder.name}.err")


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
            _plant(fault, at)
        code = main(arguments)
        file.flush()
    os._exit(code)


def _plant(fault: Callable[[], None], at: Point) -> None:
    """Lets `fault` come at the point `at`."""
    import lowcal.training.checkpoint as checkpoint
    import lowcal.training.trainer as trainer
    from lowcal.methods.local import Local
    from lowcal.training.part import Part
    from lowcal.training.record import RunFolder

    reached = 0

    def count() -> bool:
        nonlocal reached
        reached += 1
        return reached == at.number

    def around(owner: Any, name: str, *, after: bool = False, only: Callable[..., bool] = lambda *_: True) -> None:
        whole = getattr(owner, name)

        def changed(*args: Any, **kwargs: Any) -> Any:
            is_here = only(*args) and count()
            if is_here and not after:
                fault()
            result = whole(*args, **kwargs)
            if is_here and after:
                fault()
            return result

        setattr(owner, name, changed)

    match at.place:
        case "step":  # warm-up and dry runs step too, so training is known by what it notes down
            if at.number == 1:
                around(trainer, "train_epoch", after=False)
                return
            ended = Part.add

            def add(part: Part, *args: Any) -> None:
                nonlocal reached
                ended(part, *args)
                reached += 1
                if reached == at.number - 1:
                    around_optimizer()

            def around_optimizer() -> None:
                step = torch.optim.SGD.step

                def stepped(*args: Any, **kwargs: Any) -> Any:
                    torch.optim.SGD.step = step
                    fault()
                    return step(*args, **kwargs)

                torch.optim.SGD.step = stepped

            Part.add = add
        case "evaluation":
            evaluate = trainer.evaluate

            def evaluated(model: Any, batches: Any, **kwargs: Any) -> Any:
                def watched() -> Any:
                    for batch in batches:
                        if count():
                            fault()
                        yield batch

                return evaluate(model, watched(), **kwargs)

            trainer.evaluate = evaluated
        case "move":
            around(Local, "end_epoch")
        case "record":
            around(RunFolder, "append", after=True)
        case "half":
            write = checkpoint.atomic_write

            def half(path: Path, data: bytes) -> None:
                if count():
                    if fault is kill:
                        path.with_name(f".{path.name}.tmp").write_bytes(bytes(data)[: len(data) // 2])
                    fault()
                write(path, data)

            checkpoint.atomic_write = half
        case "rename":
            around(Path, "replace", after=True, only=lambda path, target: target.name == checkpoint.PREVIOUS)
        case _:
            raise ValueError(f"no place {at.place!r}")


@dataclass
class Tally:
    """A row of the table: a kind of fault, how often it was tried, and how often nothing was lost."""

    fault: str
    where: str
    tried: int = 0
    recovered: int = 0
    slowest_exit: float | None = None  # seconds from the signal to the end of the process

    def note(self, recovered: bool) -> None:
        """Counts one trial."""
        self.tried += 1
        self.recovered += recovered


class Trials:
    """Faults, each in a run of its own under `folder`, compared with an uninterrupted run.

    Args:
        folder: for the runs.
        more: options of `lowcal train` beyond the settings.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        for module in ("lowcal.console", "lowcal.experiments.train"):  # here once, not in each process
            importlib.import_module(module)
        folder.mkdir(exist_ok=True)
        self.folder, self.more = folder, more
        self._count = 0
        if train(folder / "whole", *more):
            raise RuntimeError(errors_of(folder / "whole").read_text())
        self.whole = outcome(folder / "whole")

    def broken(self, at: Point, fault: Callable[[], None], code: int) -> Path:
        """The folder of a run in which `fault` came; `code` is how its process must have ended."""
        self._count += 1
        run = self.folder / f"{at.place}-{at.number}-{self._count}"
        ended = train(run, *self.more, fault=fault, at=at)
        if ended != code:
            raise RuntimeError(f"{at}: ended with {ended}, not {code}: {errors_of(run).read_text()}")
        return run

    def goes_on(self, run: Path) -> bool:
        """Whether the run, resumed, ends like the uninterrupted one, and leaves nothing else in its folder."""
        if train(run, "--resume", *(self.more[self.more.index("--data-dir") :] if "--data-dir" in self.more else ())):
            return False
        names = [{path.name for path in place.iterdir()} for place in (run, self.folder / "whole")]
        return names[0] == names[1] and same(outcome(run), self.whole)

    def kill(self, at: Point) -> bool:
        """Whether a run that is killed at that point loses nothing."""
        return self.goes_on(self.broken(at, kill, -signal.SIGKILL))

    def terminate(self, at: Point) -> tuple[bool, float]:
        """Whether a run that gets SIGTERM at that point ends with 75 and loses nothing; the seconds that it took."""
        start: float = time.time()

        def stamped() -> None:
            (self.folder / "signalled").write_text(repr(time.time()))
            terminate()

        run = self.broken(at, stamped, 75)
        seconds = time.time() - max(start, float((self.folder / "signalled").read_text()))
        error = errors_of(run).read_text()
        is_said = error.count("\n") == 1 and "stopped by SIGTERM; go on with: lowcal train" in error
        return is_said and self.goes_on(run), seconds

    def fill_disk(self, at: Point) -> bool:
        """Whether a run that cannot write its checkpoint says so, keeps the one before, and then loses nothing."""
        run = self.broken(at, fill_disk, 2)
        error = errors_of(run).read_text()
        return error.count("\n") == 1 and "cannot write" in error and not debris(run) and self.goes_on(run)


def debris(run: Path) -> list[str]:
    """Temporary files that were left."""
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


class Trap:
    """Makes the file `path` as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damage(trials: Trials, *, truncations: int, flips: int) -> list[Tally]:
    """Damages the newest checkpoint of a killed run; the one before must be taken, and nothing of the damaged one."""
    from lowcal.training.checkpoint import MAGIC, PRESENT, PREVIOUS, load_checkpoint

    run = trials.broken(Point("step", 10), kill, -signal.SIGKILL)
    whole = (run / PRESENT).read_bytes()
    generator = random.Random(0)

    def is_passed_over(content: bytes) -> bool:
        (run / PRESENT).write_bytes(content)
        checkpoint = load_checkpoint(run)
        return checkpoint is not None and checkpoint.path == run / PREVIOUS and len(checkpoint.passed_over) == 1

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
        header = b"%s %s %d\n" % (MAGIC, hashlib.sha256(content).hexdigest().encode(), len(content))
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


def table(rows: list[Tally]) -> str:
    """The rows in Markdown."""
    lines = ["| fault | where | tried | nothing lost |", "|---|---|---|---|"]
    for row in rows:
        exit_ = "" if row.slowest_exit is None else f"; ended after {row.slowest_exit:.1f} s at most"
        lines.append(f"| {row.fault} | {row.where}{exit_} | {row.tried} | {row.recovered} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Tries all faults, prints the table and writes it beside the figures."""
    from lowcal.training.environment import gather_environment

    torch.set_num_threads(1)
    rows: list[Tally] = []
    with tempfile.TemporaryDirectory() as place:
        data = image_files(Path(place) / "images")
        kinds = {"images in memory": options()}
        for workers in (0, 2):
            kinds[f"{workers} loading workers"] = [*options(WORKERS.format(workers)), *data]
        for kind, more in kinds.items():
            trials = Trials(Path(place) / kind.replace(" ", "-"), *more)
            killed = {name: Tally("kill -9", f"{words}; {kind}") for name, words in PLACES.items()}
            for point in LONG if kind == "images in memory" else FILES:
                recovered = trials.kill(point)
                killed[point.place].note(recovered)
                print(f"{kind}: {point}: {'nothing lost' if recovered else 'LOST'}", flush=True)
            rows += [row for row in killed.values() if row.tried]
            if kind != "images in memory":
                continue
            for name, numbers in {"step": (1, 6, 16), "evaluation": (1, 5), "move": (1, 3)}.items():
                row = Tally("SIGTERM", PLACES[name])
                for number in numbers:
                    recovered, seconds = trials.terminate(Point(name, number))
                    row.note(recovered and seconds < 30)
                    row.slowest_exit = max(row.slowest_exit or 0.0, seconds)
                rows.append(row)
            full = Tally("disk full", "while a checkpoint is written")
            for number in (2, 9, 20):
                full.note(trials.fill_disk(Point("half", number)))
            rows += [full, *damage(trials, truncations=50, flips=200)]
    print(table(rows))
    environment = gather_environment("cpu")
    write_json(RESULT, {"format": 1, "environment": environment, "rows": [asdict(row) for row in rows]})
    RESULT.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
