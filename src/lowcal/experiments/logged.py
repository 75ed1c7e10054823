"""Logs what happens in runs by the loggers that a user asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.folders import recipe_in
from lowcal.experiments.loggers import SCALARS, Logger, Subject
from lowcal.experiments.recipe_text import plain_settings
from lowcal.files import first_line
from lowcal.report.table import Table
from lowcal.training.run_folder import LOGS, RunFolder

if TYPE_CHECKING:
    from lowcal.training.epoch import Progress


class LoggedWatcher:
    """Passes on to `watcher` what happens, and logs it. A context manager; at its end all logs are closed.

    A logger that raises is left out from then on, which is said once; the runs continue.

    Args:
        loggers: as `find_loggers` gives them.
        out: the folder of the run or of the comparison.
        watcher: receives all calls.
    """

    def __init__(self, loggers: Mapping[str, type[Logger]], out: Path, watcher: Watcher) -> None:
        self._loggers, self._out, self._watcher = dict(loggers), out, watcher
        self._open: dict[Path, dict[str, Logger]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def note(self, text: str) -> None:
        """See `Watcher`."""
        self._watcher.note(text)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """See `Watcher`."""
        self._watcher.stage(text, done, total)

    def begin(self, arms: Sequence[Arm], finished: Sequence[int], epochs: int, *, later: int = 0) -> None:
        """Open the logs of these arms, and close those of the arms before."""
        self._watcher.begin(arms, finished, epochs, later=later)
        self._close()
        for arm in arms:
            self._begin(self._folder(arm))

    def step(self, arm: Arm, progress: Progress) -> None:
        """See `Watcher`."""
        self._watcher.step(arm, progress)

    def epoch(self, arm: Arm, record: Mapping[str, Any]) -> None:
        """Log the epoch."""
        self._watcher.epoch(arm, record)
        self._scalars(self._folder(arm), record)

    def end(self, table: Table, page: Path | None = None) -> None:
        """Log the results of the run or of the comparison."""
        if self._out not in self._open:
            self._begin(self._out)
        for name, logger in self._logs(self._out):
            with self._guarded(name):
                logger.table(table)
                if page is not None:
                    logger.artefact(page)

    def _folder(self, arm: Arm) -> Path:
        return self._out if RunFolder.holds_run(self._out) else self._out / arm.folder

    def _begin(self, folder: Path) -> None:
        """Open the logs of the run or comparison in `folder`, and log its epochs that they lack."""
        if not self._loggers:
            return
        is_run = RunFolder.holds_run(folder)
        records = RunFolder(folder).read_epochs() if is_run else []
        subject = Subject(
            name=folder.resolve().name,
            group=self._out.resolve().name if folder != self._out else "",
            folder=folder / LOGS,
            store=self._out / LOGS,
            settings=_settings(folder) if is_run else {},
            epochs=len(records),
        )
        for path in (subject.folder, subject.store):
            path.mkdir(exist_ok=True)
        self._open[folder] = {}
        for name, kind in list(self._loggers.items()):
            with self._guarded(name):
                self._open[folder][name] = kind(subject)
        for record in records:
            self._scalars(folder, record)

    def _scalars(self, folder: Path, record: Mapping[str, Any]) -> None:
        values = {name: record[name] for name in SCALARS if record.get(name) is not None}
        epoch = record["epoch"] + 1
        for name, logger in self._logs(folder):
            if epoch > logger.logged:
                with self._guarded(name):
                    logger.scalars(epoch, values)

    def _close(self) -> None:
        for folder in self._open:
            finished = not RunFolder.holds_run(folder) or RunFolder(folder).read_summary() is not None
            for name, logger in self._logs(folder):
                with self._guarded(name):
                    logger.close(finished=finished)
        self._open = {}

    def _logs(self, folder: Path) -> list[tuple[str, Logger]]:
        """The logs of the run or comparison in `folder`, without those of loggers that have raised."""
        return [(name, log) for name, log in self._open.get(folder, {}).items() if name in self._loggers]

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Within it the logger called `name` may raise: then it is left out from now on."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the clients' own, which concern their developers
                yield
        except Exception as error:
            del self._loggers[name]
            print(f"lowcal: {name}: {first_line(error)}; the run continues without this log", file=sys.stderr)


def _settings(folder: Path) -> dict[str, bool | int | float | str]:
    method = {"method": str(RunFolder(folder).read_identity()["method"])}
    return method | plain_settings(recipe_in(folder))
