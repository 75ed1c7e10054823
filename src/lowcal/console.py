"""What the command prints: progress while runs train, and tables at the end."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from lowcal.experiments.arms import Arm
from lowcal.files import memory
from lowcal.report.runs import MOVING
from lowcal.report.table import ABSENT, Column, Table, duration, of_two, with_spread

if TYPE_CHECKING:
    from lowcal.report.page import Report
    from lowcal.training.epoch import Progress


ENOUGH = 5.0  # seconds within the first epoch after which its speed is believed


@dataclass
class _Line:
    """The latest state of one arm."""

    finished: int
    epochs: int
    part: float = 0.0  # of the running epoch
    loss: float | None = None
    boundary: str = ""
    speed: float | None = None


class Display:
    """Shows progress: a line per epoch, and below them live lines on a terminal; nothing with `quiet`.

    A context manager; the live lines vanish at its end.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # A notebook gets plain lines: it shows control characters, and rich puts each line in a box of its own.
        is_terminal = False if Console().is_jupyter else None
        self._console = Console(
            file=sys.stdout, markup=False, highlight=False, force_jupyter=False, force_terminal=is_terminal
        )
        self._quiet = quiet
        self._is_live = not quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        self._lines: dict[Arm, _Line] = {}
        self._stage = ("", 0, 0)
        self._later = 0
        self._started = 0.0
        self._before = 0.0
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._draw)

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def note(self, text: str) -> None:
        """Print one line, above the live lines."""
        if not self._quiet:
            self._print(text)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Show on a terminal what takes time before the epochs, with a bar if `total` is known; "" at its end."""
        if text != self._stage[0]:
            self._start_clock()
        self._stage = (text, done, total)

    def begin(self, arms: Sequence[Arm], finished: Sequence[int], epochs: int, *, later: int = 0) -> None:
        """Start the lines of these arms; the time left includes `later` epochs of other arms after them."""
        self._later = later
        self._lines = {arm: _Line(done, arm.epochs or epochs) for arm, done in zip(arms, finished, strict=True)}
        self._start_clock()

    def step(self, arm: Arm, progress: Progress) -> None:
        """Store the progress within an epoch; the next refresh of the live lines shows it."""
        line = self._lines[arm]
        line.part = progress.step / progress.steps
        line.loss = line.loss if progress.loss is None else progress.loss
        line.boundary = f"{progress.boundary}/{progress.layers}"
        line.speed = progress.images_per_second

    def epoch(self, arm: Arm, record: Mapping[str, Any]) -> None:
        """Store the end of an epoch, and print its line."""
        line = self._lines[arm]
        line.finished, line.part, line.loss = record["epoch"] + 1, 0.0, record["train_loss"]
        line.boundary = f"{record['boundary']}/{record['layers']}"
        line.speed = record["images_per_second"]
        if self._quiet:
            return
        width, longest = len(str(line.epochs)), max(len(other.folder) for other in self._lines)
        # The live lines of a terminal have the speed and the time left.
        more = "" if self._is_live else f"  {_speed(line.speed)}  {clock(self._left())} left"
        self._print(
            f"{arm.folder:<{longest}}  {line.finished:>{width}}/{line.epochs}  loss {_number(line.loss, 4)}"
            f"  error {_number(record['top1_error'], 2)} %  boundary {line.boundary}{more}"
        )
        self._console.file.flush()

    def _print(self, text: str) -> None:
        """Print a line; only a terminal breaks it between words."""
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def _work(self) -> float:
        return sum(line.finished + line.part for line in self._lines.values())

    def _start_clock(self) -> None:
        self._started, self._before = time.monotonic(), self._work()

    def _left(self) -> float | None:
        """Return the seconds until all arms end, from the speed so far; None before it is known well enough."""
        done, passed = self._work() - self._before, time.monotonic() - self._started
        if done <= 0 or (done < 1 and passed < ENOUGH):
            return None
        total = self._later + sum(line.epochs for line in self._lines.values())
        return passed * (total - self._before - done) / done

    def _draw(self) -> Group:
        grid = Grid.grid(padding=(0, 2, 0, 0))
        for column in range(6):
            grid.add_column(justify="right" if column in {1, 5} else "left", no_wrap=True)
        longest = max((len(arm.folder) for arm in self._lines), default=0)
        for arm, line in self._lines.items():
            # The longest name and the bar have 26 columns together, so that a line fits in 80.
            bar = ProgressBar(total=line.epochs, completed=line.finished + line.part, width=max(4, 26 - longest))
            epoch = min(line.finished + 1, line.epochs)
            grid.add_row(
                Text(arm.folder, style="bold"),
                f"{epoch}/{line.epochs}",
                bar,
                f"loss {_number(line.loss, 3)}",
                f"boundary {line.boundary or '-'}",
                _speed(line.speed),
            )
        text, done, total = self._stage
        if not text and not self._lines:
            return Group(Text("starting"))
        if not text:
            return Group(grid, Text(f"{clock(self._left())} left; after Ctrl-C the runs can be resumed"))
        stage = Grid.grid(padding=(0, 2, 0, 0))
        cells = (text, ProgressBar(total=total, completed=done, width=30), f"{done:,}/{total:,}") if total else (text,)
        stage.add_row(*cells)
        return Group(grid, stage)


def comparison_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a comparison from the rows of its `summary.json`, at most 80 columns wide."""
    columns = (
        Column("method", "method"),
        Column("top1_error", "top-1 error %", _error),
        Column("seconds", "time", "duration"),
        Column("speedup", "speed-up", _speedup),
        Column("flops_ratio", "FLOPs", ".2f", "×"),
        Column("peak_memory_bytes", "memory", _memory),
        Column("boundary", "boundary", _boundary),
    )
    return Table(columns, rows).text()


def report_text(report: Report) -> str:
    """Return a report's table, and what a reader must know with it."""
    summary = report.summary
    seeds = sorted({row["seeds"] for row in summary["rows"]})
    many = " to ".join(str(count) for count in (seeds[0], *seeds[1:][-1:])) + f" seed{'s' * (seeds[-1] > 1)}"
    return "\n".join(
        [
            paragraph(f"{summary['title']}; {many}; {summary['environment']['device_name']}"),
            paragraph(f"recipe: {summary['label'] or summary['recipe']}"),
            f"\n{comparison_text(summary['rows'])}\n",
            "speed-up, FLOPs: against sgd; memory: peak of a step→in the last epoch",
            *(paragraph(note) for note in (*report.notes, report.headline)),
            f"report: {report.page}",
        ]
    )


def run_text(summary: Mapping[str, Any], folder: Path) -> str:
    """Return the results of a run from its `summary.json`."""
    return (
        f"{summary['method']}: top-1 error {summary['top1_error']:.2f} %, training {duration(summary['seconds'])}, "
        f"boundary {summary['boundary']}/{summary['layers']}\nrun: {folder}"
    )


def paragraph(text: str) -> str:
    """Return the text broken between words at 80 columns."""
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)


def layers_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a network's layers in execution order."""
    columns = (
        Column("index", "#", "number"),
        Column("name", "layer"),
        Column("kind", "kind"),
        Column("weight", "weight", lambda row: "x".join(map(str, row["weight"])), left=True),
        Column("parameters", "parameters", lambda row: f"{row['parameters']:,}"),
        Column("flops", "FLOPs", "amount"),
        Column("followers", "followers", lambda row: str(len(row["followers"]))),
    )
    return Table(columns, rows).text()


def clock(seconds: float | None) -> str:
    """Return a time as 3:05 (minutes) or 1:02:03 (hours)."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _error(row: Mapping[str, Any]) -> str:
    """Return a mean with its deviation; for two seeds only the two values, so that the table fits in its width."""
    error, deviation = row["top1_error"], row["top1_error_std"]
    if row["seeds"] == 2 and error is not None and deviation is not None:
        low, high = of_two(error, deviation)
        return f"{low:.2f} to {high:.2f}"
    return with_spread(error, deviation, row["seeds"])


def _speedup(row: Mapping[str, Any]) -> str:
    return with_spread(row["speedup"], None, None, unit="×")


def _memory(row: Mapping[str, Any]) -> str:
    """Return the peak of all epochs and that of the last one in one unit: 16.6→9.02MiB."""
    peak, last = row["peak_memory_bytes"], row["last_memory_bytes"]
    if last == peak:
        return memory(peak)
    return f"{memory(peak).split()[0]}→{memory(last, of=peak).replace(' ', '')}"


def _boundary(row: Mapping[str, Any]) -> str:
    return f"{row['boundary']:.0f}/{row['layers']}" if row["method"] in MOVING or row["boundary"] else ABSENT


def _speed(images_per_second: float | None) -> str:
    return "- img/s" if images_per_second is None else f"{images_per_second:,.0f} img/s"
