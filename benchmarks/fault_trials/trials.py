"""Trials: a fault in a run, the run gone on with, and the comparison with one that was never interrupted."""

from __future__ import annotations

import importlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_trials.points import Point, hang, hang_with_the_gil, kill, terminate
from fault_trials.runs import errors_of, outcome, same, train


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
        folder: for the runs; the file of a run's errors lies beside it.
        more: options of `lowcal train` beyond the settings.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        self.load()
        folder.mkdir(exist_ok=True)
        self.folder, self.more = folder, more
        self._count = 0
        if train(folder / "whole", *more):
            raise RuntimeError(errors_of(folder / "whole").read_text())
        self.whole = outcome(folder / "whole")

    @staticmethod
    def load() -> None:
        """Loads what runs need, once, and not in each process."""
        for module in ("lowcal.console", "lowcal.experiments.train", "torch._dynamo"):
            importlib.import_module(module)

    def broken(self, at: Point, fault: Callable[[], None], code: int, place: Path | None = None) -> Path:
        """The folder, in `place`, of a run in which `fault` came; `code` is how its process must have ended."""
        self._count += 1
        run = (place or self.folder) / f"{at.place}-{at.number}-{self._count}"
        ended = train(run, *self.more, fault=fault, at=at)
        if ended != code:
            raise RuntimeError(f"{at}: ended with {ended}, not {code}: {errors_of(run).read_text()}")
        return run

    def goes_on(self, run: Path) -> bool:
        """Whether the run, resumed, ends like the uninterrupted one, and leaves nothing else in its folder.

        One that had not even its folder is started anew, by the same command.
        """
        from lowcal.training.run_folder import RunFolder

        data = self.more[self.more.index("--data-dir") :] if "--data-dir" in self.more else ()
        more = ("--resume", *data) if RunFolder.holds_run(run) else self.more
        if train(run, *more):
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

    def hang(self, at: Point, *, with_the_gil: bool) -> bool:
        """Whether a run that hangs in native code and gets SIGTERM is ended from outside and loses nothing."""
        fault, code = (hang_with_the_gil, -signal.SIGKILL) if with_the_gil else (hang, 75)
        run = self.broken(at, fault, code)
        error = errors_of(run).read_text()
        is_said = error.count("\n") == 1 and "stopped by SIGTERM without saving" in error
        return is_said and "go on with: lowcal train" in error and self.goes_on(run)
