"""Trials of runs by two processes that torchrun looks after, one of which is killed or told to end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fault_trials.points import Point, kill, plant, terminate
from fault_trials.runs import errors_of, outcome, same
from fault_trials.trials import Trials

WORLD = 2
# Where, and in which process.
TERMINATED = (
    *((Point("step", number), rank) for number, rank in ((1, 0), (6, 1), (16, 1))),
    *((Point("evaluation", number), rank) for number, rank in ((1, 1), (5, 0))),
    *((Point("move", number), rank) for number, rank in ((1, 1), (3, 0))),
)
KILLED = (
    *((Point("step", number), rank) for number, rank in ((1, 1), (7, 1), (13, 0))),
    *((Point("evaluation", number), rank) for number, rank in ((1, 1), (5, 0))),
    *((Point("move", number), rank) for number, rank in ((1, 0), (3, 1))),
    (Point("record", 2), 0),
    (Point("half", 12), 0),
    (Point("finish", 4), 0),
)
Fault = Callable[[], None]


def train(
    folder: Path, *more: str, fault: Fault | None = None, at: Point | None = None, rank: int = 0, restarts: int = 0
) -> int:
    """`torchrun --nproc-per-node 2 --max-restarts RESTARTS -m lowcal train`; torchrun's exit code.

    The fault comes in process `rank`, once. Beside `folder` are a file with what was said on standard error, and one
    with the exit code of each process that ended by itself.
    """
    errors_of(folder).unlink(missing_ok=True)
    for number in range(WORLD):
        code_of(folder, number).unlink(missing_ok=True)
    arguments = ["train", "--quiet", "--device", "cpu", "--out", str(folder), *more]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_torchrun, args=(restarts, (arguments, folder, fault, at, rank)))
    process.start()
    process.join()
    return int(process.exitcode or 0)


def code_of(folder: Path, rank: int) -> Path:
    """The file with the exit code of process `rank`."""
    return folder.with_name(f"{folder.name}.code-{rank}")


def _torchrun(restarts: int, arguments: tuple[list[str], Path, Fault | None, Point | None, int]) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=WORLD,
            run_id="trial",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=restarts,
            start_method="fork",
        )
        try:
            elastic_launch(config, _process)(*arguments)
        except ChildFailedError:
            os._exit(1)
    os._exit(0)


def _process(arguments: list[str], folder: Path, fault: Fault | None, at: Point | None, rank: int) -> None:
    from lowcal.cli import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's own came along with the fork
    torch.set_num_threads(1)
    own, is_first = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with errors_of(folder).open("a") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        if fault is not None and at is not None and own == rank and is_first:
            plant(fault, at)
        code = main(arguments)
        file.flush()
    code_of(folder, own).write_text(str(code))
    if code:
        os._exit(code)


class RankTrials:
    """Faults in runs of two processes, compared with an uninterrupted run of as many.

    Args:
        folder: for the runs.
        more: options of `lowcal train`.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        Trials.load()
        folder.mkdir(exist_ok=True)
        self.folder, self.more = folder, more
        self._count = 0
        if train(folder / "whole", *more):
            raise RuntimeError(errors_of(folder / "whole").read_text())
        self.whole = outcome(folder / "whole")

    def kill(self, at: Point, rank: int) -> bool:
        """Whether a run one of whose processes is killed there is ended by torchrun alone, with nothing lost."""
        run = self._new(at)
        return train(run, *self.more, fault=kill, at=at, rank=rank, restarts=1) == 0 and self._is_whole(run)

    def terminate(self, at: Point, rank: int) -> tuple[bool, float]:
        """Whether SIGTERM to one process there ends both with 75 and one line, and the run goes on; the seconds."""
        run, mark = self._new(at), self.folder / "signalled"

        def stamped() -> None:
            mark.write_text(repr(time.time()))
            terminate()

        ended = train(run, *self.more, fault=stamped, at=at, rank=rank)
        seconds = time.time() - float(mark.read_text())
        codes = [code_of(run, number).read_text() for number in range(WORLD)]
        said = errors_of(run).read_text()
        is_said = said.count("\n") == 1 and "stopped by SIGTERM; go on with: torchrun --nproc-per-node 2 -m" in said
        goes_on = ended == 1 and codes == ["75", "75"] and is_said and train(run, "--resume") == 0
        return goes_on and self._is_whole(run), seconds

    def lose(self, at: Point, rank: int) -> bool:
        """Whether the other of two processes ends with one line when one is killed and nothing starts them anew."""
        run = self._new(at)
        ended = train(run, *self.more, fault=kill, at=at, rank=rank)
        said = errors_of(run).read_text()
        is_said = said.count("\n") == 1 and "another process of the run has ended" in said
        return ended == 1 and is_said and train(run, "--resume") == 0 and self._is_whole(run)

    def _new(self, at: Point) -> Path:
        self._count += 1
        return self.folder / f"{at.place}-{at.number}-{self._count}"

    def _is_whole(self, run: Path) -> bool:
        names = [{path.name for path in place.iterdir()} for place in (run, self.folder / "whole")]
        return names[0] == names[1] and same(outcome(run), self.whole)
