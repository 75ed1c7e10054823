"""Runs of two processes under torchrun, and faults in one of them."""

import os
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..world import apart, processes
from .points import Point, kill, plant
from .runs import Trials, errors_of, says

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


def code_of(folder, rank):
    """The file with the exit code of process `rank`."""
    return folder.with_name(f"{folder.name}.code-{rank}")


def _torchrun(restarts, *arguments):
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


def _process(arguments, folder, fault, at, rank):
    from lowcal.cli import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's own handler came along with the fork
    torch.set_num_threads(1)
    own, is_first = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with errors_of(folder).open("a") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        if fault is not None and own == rank and is_first:
            plant(fault, at)
        code = main(arguments)
        file.flush()
    code_of(folder, own).write_text(str(code))
    if code:
        os._exit(code)


class RankTrials(Trials):
    """Faults in one of two processes, compared with an uninterrupted run of two processes."""

    def undisturbed(self, run):
        from lowcal.cli import main

        arguments = ["train", "--quiet", "--device", "cpu", "--out", str(run), *self.more]
        return any(apart(WORLD, main, arguments))

    def start(self, run, *more, fault=None, at=None, rank=0, restarts=0):
        """`torchrun --nproc-per-node 2 --max-restarts RESTARTS -m lowcal train`; torchrun's exit code.

        The fault comes once, in process `rank`. Beside `run` are a file with what was written to standard error, and
        one with the exit code of each process that ended by itself.
        """
        for file in (errors_of(run), *(code_of(run, number) for number in range(WORLD))):
            file.unlink(missing_ok=True)
        arguments = ["train", "--quiet", "--device", "cpu", "--out", str(run), *more]
        process = processes().Process(target=_torchrun, args=(restarts, arguments, run, fault, at, rank))
        process.start()
        process.join()
        return process.exitcode or 0

    def kill(self, at, rank):
        """Whether torchrun alone finishes a run that lost a process there, with nothing lost."""
        run = self.new(at)
        return self.start(run, *self.more, fault=kill, at=at, rank=rank, restarts=1) == 0 and self.is_whole(run)

    def terminate(self, at, rank):
        """Whether SIGTERM to one process ends both with 75 and one line, and the run goes on; the seconds."""
        run = self.new(at)
        ended = self.start(run, *self.more, fault=self.stamped, at=at, rank=rank)
        seconds = self.seconds_since_signal()
        codes = [code_of(run, number).read_text() for number in range(WORLD)]
        saved = says(run, "stopped by SIGTERM; go on with: torchrun --nproc-per-node 2 -m") and codes == ["75", "75"]
        return ended == 1 and saved and self.goes_on(run), seconds

    def lose(self, at, rank):
        """Whether the other process ends with one line when one is killed and nothing starts them again."""
        run = self.new(at)
        ended = self.start(run, *self.more, fault=kill, at=at, rank=rank)
        return ended == 1 and says(run, "another process of the run has ended") and self.goes_on(run)
