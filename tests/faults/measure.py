"""Faults on purpose: runs that are killed, stopped or starved at chosen points must end as if nothing had happened.

    python -m tests.faults.measure    # all of them, minutes; writes results/faults.json

Each run is a process of its own that trains a small network by local learning over two moves of the boundary, saving
after each step. What is compared with an uninterrupted run, bit for bit: weights, optimizer, every random state, log
lines and summary; times are left out.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lowcal.files import write_json

from . import pictures, ranks, storage
from .points import FILES, LONG, PLACES, Point
from .runs import WORKERS, Tally, Trials, image_files, options

RESULT = Path(__file__).parents[2] / "results" / "faults.json"


def killed(trials: Trials, points: tuple[Point, ...], kind: str) -> list[Tally]:
    """A row for each place."""
    rows = {name: Tally("kill -9", f"{words}; {kind}") for name, words in PLACES.items()}
    for point in points:
        recovered = trials.kill(point)
        rows[point.place].note(recovered)
        print(f"{kind}: {point}: {'nothing lost' if recovered else 'LOST'}", flush=True)
    return [row for row in rows.values() if row.tried]


def terminated(trials: Trials) -> list[Tally]:
    """A row for each place."""
    rows = []
    for name, numbers in {"step": (1, 6, 16), "evaluation": (1, 5), "move": (1, 3)}.items():
        row = Tally("SIGTERM", PLACES[name])
        for number in numbers:
            recovered, seconds = trials.terminate(Point(name, number))
            row.note(recovered and seconds < 30)
            row.slowest_exit = max(row.slowest_exit or 0.0, seconds)
        rows.append(row)
    return rows


def hung(trials: Trials) -> list[Tally]:
    """A row for each place in which native code hangs, with the GIL and without it."""
    rows = []
    for name, numbers in {"step": (6, 16), "evaluation": (5,)}.items():
        row = Tally("SIGTERM to a process that hangs in native code", PLACES[name])
        for number in numbers:
            for with_the_gil in (False, True):
                row.note(trials.hang(Point(name, number), with_the_gil=with_the_gil))
        rows.append(row)
    return rows


def of_two(trials: ranks.RankTrials) -> list[Tally]:
    """Rows of runs of two processes."""
    told = Tally("SIGTERM to one of two processes", "in training, in evaluation and at a move")
    for point, rank in ranks.TERMINATED:
        recovered, seconds = trials.terminate(point, rank)
        told.note(recovered and seconds < 30)
        told.slowest_exit = max(told.slowest_exit or 0.0, seconds)
    killed = Tally("kill -9 of one of two processes", "at any of these places; torchrun --max-restarts 1 goes on")
    for point, rank in ranks.KILLED:
        killed.note(trials.kill(point, rank))
    lost = Tally("kill -9 of one of two processes", "in training; the other ends, and the run is resumed")
    for rank in range(ranks.WORLD):
        lost.note(trials.lose(Point("step", 7), rank))
    return [told, killed, lost]


def starved(trials: Trials, mounted: Path) -> list[Tally]:
    """Full disks, and temporary files on another one; what cannot be tried here is said and left out."""
    limited = Tally("no file may grow (RLIMIT_FSIZE)", storage.FULL)
    for point in storage.LIMITED:
        limited.note(storage.limited(trials, point))
    rows = [limited]

    def attempt(row: Tally, points: tuple[Point, ...], trial: Callable[[Point], bool]) -> None:
        for point in points:
            row.note(trial(point))
        rows.append(row)

    try:
        with storage.small_disk(mounted) as disk:
            row = Tally("disk full (tmpfs)", storage.FULL)
            attempt(row, storage.FILLED, lambda point: storage.full(trials, point, disk))
    except storage.CannotTryError as error:
        print(f"disk full (tmpfs): not tried: {error}")
    try:
        row = Tally("kill -9, temporary folder on another file system", storage.SAVING)
        attempt(row, storage.ELSEWHERE, lambda point: storage.elsewhere(trials, point))
    except storage.CannotTryError as error:
        print(f"temporary folder on another file system: not tried: {error}")
    return rows


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
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        kind = "images in memory"
        trials = Trials(place / "memory", *options())
        rows += killed(trials, LONG, kind)
        rows += terminated(trials)
        rows += hung(Trials(place / "hung", *options("checkpoint.grace=1")))
        rows += starved(trials, place / "disk")
        rows += storage.damage(trials, truncations=50, flips=200)
        data = image_files(place / "images")
        for workers in (0, 2):
            trials = Trials(place / f"workers-{workers}", *options(WORKERS.format(workers)), *data)
            rows += killed(trials, FILES, f"{workers} loading workers")
        rows += pictures.trials(place / "pictures")
        rows += of_two(ranks.RankTrials(place / "ranks", *options()))
    print(table(rows))
    environment = gather_environment("cpu")
    write_json(RESULT, {"format": 1, "environment": environment, "rows": [asdict(row) for row in rows]})
    RESULT.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
