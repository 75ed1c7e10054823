"""Where in a run a fault comes, and which."""

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Point:
    """Where in a run a fault comes: the `number`-th time, counted from 1, that `place` is reached."""

    place: str
    number: int


PLACES = {
    "creation": "while the run's folder is made",
    "step": "in a step, before the optimizer",
    "evaluation": "in evaluation",  # three batches of it in an epoch
    "move": "at an epoch's end, before the boundary moves",
    "record": "between log line and checkpoint",
    "half": "with half a checkpoint written",
    "rename": "between the renames of a checkpoint",
    "finish": "while weights and summary are written",
}
SHORT = (Point("creation", 4), Point("step", 7), Point("move", 3), Point("evaluation", 5), Point("half", 12))
LONG = (
    *(Point("creation", number) for number in range(1, 7)),  # three files, each with half of it and with all of it
    *(Point("step", number) for number in (1, 4, 5, 10, 13, 16)),
    *(Point("evaluation", number) for number in (1, 6, 11)),
    *(Point("move", number) for number in (1, 2, 4)),
    *(Point("record", number) for number in (1, 3)),
    *(Point("half", number) for number in (1, 9, 20)),
    *(Point("rename", number) for number in (2, 10, 19)),
    *(Point("finish", number) for number in (1, 4, 5, 6)),  # two files of weights and the summary, likewise
)
# Of a run that loads files, whose evaluation is one batch.
FILES_SHORT = (Point("step", 7), Point("evaluation", 2))
FILES = tuple(Point("evaluation", -(-point.number // 3)) if point.place == "evaluation" else point for point in LONG)


def kill() -> None:
    """The process ends at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """What a scheduler sends."""
    os.kill(os.getpid(), signal.SIGTERM)


def hang() -> None:
    """What a scheduler sends, and then a call into native code that never returns."""
    terminate()
    _lock_twice(ctypes.CDLL(None))


def hang_with_the_gil() -> None:
    """The same, with Python's lock held, so that no thread of the process can run."""
    terminate()
    _lock_twice(ctypes.PyDLL(None))


def _lock_twice(library: ctypes.CDLL) -> None:
    lock = ctypes.create_string_buffer(256)  # zeros are a free mutex; no signal ends the waiting for one
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)


def limit_files() -> None:
    """No file may grow over 1,000 bytes from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def plant(fault: Callable[[], None], at: Point) -> None:
    """Lets `fault` come in this process at the point `at`."""
    import lowcal.files as files
    import lowcal.training.checkpoint as checkpoint
    import lowcal.training.epoch as epoch
    import lowcal.training.run_folder as record
    from lowcal.methods.boundary import Local
    from lowcal.training.epoch_state import EpochState
    from lowcal.training.run_folder import RunFolder

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

    def writing(owner: Any, *names: str, only_half: bool = False) -> None:
        """With half of one of these files written; the next point is with all of it in its place."""
        write = owner.atomic_write

        def half(path: Path, *parts: bytes, **options: Any) -> None:
            is_here = path.name in names
            if is_here and count():
                if fault is kill:
                    data = b"".join(parts)
                    path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])
                fault()
            write(path, *parts, **options)
            if is_here and not only_half and count():
                fault()

        owner.atomic_write = half

    match at.place:
        case "creation":
            writing(record, "epochs.jsonl", "recipe.yaml")
            writing(files, "environment.json")
        case "step":  # warm-up and dry runs step too, so training is known by what it notes down
            if at.number == 1:
                around(epoch.EpochLoop, "_take_steps")
                return
            ended = EpochState.add

            def add(state: EpochState, *args: Any) -> None:
                nonlocal reached
                ended(state, *args)
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

            EpochState.add = add
        case "evaluation":
            evaluate = epoch.evaluate

            def evaluated(model: Any, batches: Any, **kwargs: Any) -> Any:
                def watched() -> Any:
                    for batch in batches:
                        if count():
                            fault()
                        yield batch

                return evaluate(model, watched(), **kwargs)

            epoch.evaluate = evaluated
        case "move":
            around(Local, "end_epoch")
        case "log":
            around(RunFolder, "append")
        case "record":
            around(RunFolder, "append", after=True)
        case "half":
            writing(files, checkpoint.NEXT, only_half=True)
        case "rename":
            around(Path, "replace", after=True, only=lambda path, target: target.name == checkpoint.PREVIOUS)
        case "finish":
            writing(checkpoint, checkpoint.WEIGHTS, checkpoint.SAFE_WEIGHTS)
            writing(files, "summary.json")
        case _:
            raise ValueError(f"no place {at.place!r}")
