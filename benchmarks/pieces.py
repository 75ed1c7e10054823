"""Pieces of a measurement that must end in a given time: each in a process, with a limit and a file of its own."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from lowcal.experiments.assemble import find_device
from lowcal.files import FORMAT, first_line, read_json, write_json
from lowcal.training.environment import gather_environment

PLANNED = 12 * 60.0  # seconds of all pieces together, for which their limits are given


class Record:
    """The file of a piece: whole JSON at each moment."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.facts: dict[str, Any] = {"format": FORMAT, "piece": name, "status": "running", "reason": None}
        self.add()

    def add(self, **facts: Any) -> None:
        """Write the file again, with `facts` in it."""
        self.facts |= facts
        write_json(self._path, self.facts)


@dataclass(frozen=True)
class Job:
    """What a piece may use.

    Attributes:
        until: the moment at which it is cut off, by `time.monotonic`.
        small: whether everything is tiny, to try the script out.
    """

    device: str
    data_dir: Path | None = None
    small: bool = False
    until: float = float("inf")

    @property
    def recorded(self) -> str:
        """The fastest kind of step that needs no compiling."""
        return "graphed" if self.device.startswith("cuda") else "eager"


@dataclass(frozen=True)
class Piece:
    """Something to run, and the seconds that it may take."""

    run: Callable[[Job, Record], None]
    seconds: float


def run(found: Mapping[str, Piece], job: Job, out: Path, seconds: float, *, reserve: float = 0.0) -> list[str]:
    """Run the pieces in turn; return those that did not end well, with the reason.

    Args:
        seconds: for all of them together; the limits of pieces are in proportion to `PLANNED`.
        reserve: seconds that are kept for the last piece.
    """
    start, last = monotonic(), list(found)[-1]
    done: list[dict[str, Any]] = []
    for name, piece in found.items():
        left = seconds - (monotonic() - start) - (reserve if name != last else 0.0)
        limit = min(left, piece.seconds * seconds / PLANNED)
        print(f"== {name}, at {monotonic() - start:.0f} s, for {limit:.0f} s at most", flush=True)
        began = monotonic()
        facts = _outcome(name, piece, replace(job, until=began + limit), out, limit)
        took = {"seconds": round(monotonic() - began, 1), "limit": round(limit, 1)}
        done.append({"piece": name, "status": facts["status"], "reason": facts["reason"], **took})
        print(f"== {name}: {facts['status']} {facts['reason'] or ''}", flush=True)
        write_json(out / "summary.json", {"format": FORMAT, "seconds": seconds, "pieces": done})
    return [f"{each['piece']}: {each['status']}: {each['reason']}" for each in done if each["status"] != "done"]


def _outcome(name: str, piece: Piece, job: Job, out: Path, limit: float) -> dict[str, Any]:
    """Run one piece in a process of its own; return the facts of its file, which says how it ended."""
    path = out / f"{name}.json"
    record = Record(path, name)
    if limit <= 1.0:
        record.add(status="left out", reason="no time was left")
        return record.facts
    # Forked, so that torch is loaded once: this process does not use the device, unless its caller has done so.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    process = context.Process(target=_child, args=(name, piece, job, path))
    process.start()
    process.join(limit)
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile for it
        process.kill()
        process.join()
        ended = {"status": "cut off", "reason": f"it took longer than {limit:.0f} s"}
    else:
        ended = {"status": "crashed", "reason": f"exit code {process.exitcode}"}
    record.facts = read_json(path)
    if record.facts["status"] == "running":
        record.add(**ended)
    return record.facts


def _child(name: str, piece: Piece, job: Job, path: Path) -> None:
    os.setsid()
    record = Record(path, name)
    try:
        find_device(job.device)
        record.add(environment=gather_environment(job.device))
        piece.run(job, record)
        record.add(status="done")
    except Exception as error:
        traceback.print_exc()
        record.add(status="failed", reason=f"{type(error).__name__}: {first_line(error)}")
