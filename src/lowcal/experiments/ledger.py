"""Who does which trial: a table in the sweep's database that any number of workers share.

A worker holds a trial only while it gives signs of life: a counter that it raises every few seconds. A counter that
another worker has seen standing still for the lease counts as that of a dead one, and the trial can be taken over. Only
the observer's own clock is used, so the machines' clocks need not agree. Each change is one UPDATE that names the state
it found, so that of two workers only one succeeds, in SQLite as in a database server.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from optuna.exceptions import StorageInternalError
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, create_engine, insert, select, update
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from lowcal.errors import LowcalError

WAIT_FOR_LOCK = 30.0  # seconds, of SQLite, where one writer keeps all others out
MOST_DEATHS = 3  # workers in a row that may die on a trial without finishing an epoch of it

_TABLES = MetaData()
_SWEEPS = Table(
    "lowcal_sweeps", _TABLES, Column("study", String(200), primary_key=True), Column("definition", Text, nullable=False)
)
_TRIALS = Table(
    "lowcal_trials",
    _TABLES,
    Column("study", String(200), primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("owner", String(200)),  # NULL: nobody
    Column("beat", Integer, nullable=False),
    Column("deaths", Integer, nullable=False),
    Column("number", Integer),  # Optuna's; NULL: its settings are not chosen yet
    Column("chosen", Text),
    Column("outcome", Text),  # NULL: unfinished
)


@dataclass(frozen=True)
class Entry:
    """One trial as the table has it.

    Attributes:
        trial: its number in the sweep, from 0.
        owner: the worker that has it; None: nobody.
        beat: that worker's signs of life so far.
        deaths: workers in a row that it ended with, without an epoch.
        number: of Optuna's trial; None: not begun.
        chosen: its settings as Optuna knows them; empty: not begun.
        outcome: its results; None: unfinished.
    """

    trial: int
    owner: str | None
    beat: int
    deaths: int
    number: int | None
    chosen: Mapping[str, Any]
    outcome: Mapping[str, Any] | None


def storage_url(text: str) -> URL:
    """The database that `text` names.

    Raises:
        LowcalError: it names none that several processes can share, or its driver is not installed.
    """
    try:
        url = make_url(text)
        dialect = url.get_dialect()
        dialect.import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        raise LowcalError(
            f"--storage {text}: is no database's URL; as in sqlite:///sweep.db or postgresql://user@host/name"
        ) from None
    except ImportError as error:
        raise LowcalError(
            f"--storage {_shown(url)}: needs the Python package '{error.name}', which is not here; install it"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise LowcalError(f"--storage {text}: lives in one process alone; name a file, as in sqlite:///sweep.db")
    return url


def connect_args(url: URL) -> dict[str, Any]:
    """What the database's driver is told."""
    return {"timeout": WAIT_FOR_LOCK} if url.get_backend_name() == "sqlite" else {}


@contextmanager
def reachable(url: URL) -> Iterator[None]:
    """Turns what a database refuses into one line."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, OSError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
        if "locked" in reason:
            remedy = "another program holds it; end that program, or use a database server for many workers"
        else:
            remedy = "check the URL, the server and its rights"
        raise LowcalError(f"the sweep's storage {_shown(url)} cannot be used ({reason}); {remedy}") from None


class Ledger:
    """The trials of one sweep.

    Args:
        url: the database.
        study: the sweep's name there.
        lease: seconds without a sign of life after which a trial may be taken over.
    """

    def __init__(self, url: URL, study: str, lease: float) -> None:
        self.url, self.study, self.lease = url, study, lease
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._engine: Engine = create_engine(url, connect_args=connect_args(url))
        self._seen: dict[int, tuple[str | None, int, float]] = {}  # owner, beat, and since when they are so

    def join(self, definition: str) -> str:
        """Enter a sweep unless it is there; returns the definition of the one that is there then."""
        with reachable(self.url):
            self._make_tables()
            with suppress(IntegrityError), self._engine.begin() as connection:  # it may be there
                connection.execute(insert(_SWEEPS).values(study=self.study, definition=definition))
            with self._engine.connect() as connection:
                query = select(_SWEEPS.c.definition).where(_SWEEPS.c.study == self.study)
                return connection.execute(query).scalar_one()

    def grow(self, trials: int) -> None:
        """Add the trials that the sweep lacks to have `trials` of them."""
        for trial in range(len(self.entries()), trials):
            row = {"study": self.study, "trial": trial, "beat": 0, "deaths": 0}
            with reachable(self.url), suppress(IntegrityError), self._engine.begin() as connection:
                connection.execute(insert(_TRIALS).values(**row))  # unless another worker was faster

    def entries(self) -> list[Entry]:
        """All trials, in order."""
        columns = [_TRIALS.c[name] for name in Entry.__dataclass_fields__]
        with reachable(self.url), self._engine.connect() as connection:
            rows = connection.execute(select(*columns).where(_TRIALS.c.study == self.study).order_by(_TRIALS.c.trial))
            return [
                Entry(trial, owner, beat, deaths, number, json.loads(chosen or "{}"), outcome and json.loads(outcome))
                for trial, owner, beat, deaths, number, chosen, outcome in rows
            ]

    def claim(self) -> Entry | None:
        """Take a trial: a dead worker's if there is one, else one that nobody has; None if there is none to take."""
        entries = [entry for entry in self.entries() if entry.outcome is None]
        stale = self._observe(entries)
        for entry in [*stale, *(entry for entry in entries if entry.owner is None)]:
            deaths = entry.deaths + (entry.owner is not None)
            taken = {"owner": self.owner, "beat": entry.beat + 1, "deaths": deaths}
            if self._change(entry.trial, taken, owner=entry.owner, beat=entry.beat):
                return replace(entry, owner=self.owner, beat=entry.beat + 1, deaths=deaths)
        return None

    def observe(self) -> None:
        """Look at the others' signs of life, so that the dead are known when a trial is wanted."""
        self._observe([entry for entry in self.entries() if entry.outcome is None])

    def assign(self, trial: int, number: int, chosen: Mapping[str, Any]) -> bool:
        """Note the settings of a trial that this worker has, and Optuna's number of it; False if it is lost."""
        return self._change(trial, {"number": number, "chosen": json.dumps(dict(chosen))}, owner=self.owner)

    def beat(self, trial: int) -> bool:
        """Give a sign of life; False if another worker has the trial by now."""
        return self._change(trial, {"beat": _TRIALS.c.beat + 1}, owner=self.owner)

    def progress(self, trial: int) -> bool:
        """As `beat`, at the end of an epoch: the trial is not what workers die of."""
        return self._change(trial, {"beat": _TRIALS.c.beat + 1, "deaths": 0}, owner=self.owner)

    def release(self, trial: int, *, deaths: int) -> bool:
        """Give a trial back, unfinished, for anyone to take at once; `deaths`: what is now held against it."""
        return self._change(trial, {"owner": None, "deaths": deaths}, owner=self.owner)

    def finish(self, trial: int, outcome: Mapping[str, Any]) -> bool:
        """Enter the results; False, and nothing is entered, if another worker has the trial by now."""
        return self._change(trial, {"outcome": json.dumps(dict(outcome)), "owner": None}, owner=self.owner)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def _change(self, trial: int, values: Mapping[str, Any], *, owner: str | None, beat: int | None = None) -> bool:
        """Change a trial if it is unfinished and `owner`'s, at `beat` if that is given; whether it was."""
        mine = update(_TRIALS).where(_TRIALS.c.study == self.study, _TRIALS.c.trial == trial)
        mine = mine.where(_TRIALS.c.outcome.is_(None), _TRIALS.c.owner == owner)
        if beat is not None:
            mine = mine.where(_TRIALS.c.beat == beat)
        with reachable(self.url), self._engine.begin() as connection:
            return connection.execute(mine.values(**values)).rowcount == 1

    def _observe(self, entries: list[Entry]) -> list[Entry]:
        """Those of `entries` whose workers have not been heard of for the lease."""
        now, stale = time.monotonic(), []
        for entry in entries:
            owner, beat, since = self._seen.get(entry.trial, (None, -1, now))
            if (owner, beat) != (entry.owner, entry.beat):
                since = now
            self._seen[entry.trial] = entry.owner, entry.beat, since
            if entry.owner is not None and now - since >= self.lease:
                stale.append(entry)
        return stale

    def _make_tables(self) -> None:
        for left in range(5, -1, -1):
            try:
                return _TABLES.create_all(self._engine)
            except SQLAlchemyError:  # another worker may be making them
                if not left:
                    raise
                time.sleep(0.2)
        return None


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)
