"""The database of a sweep: an Optuna study that any number of workers share."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from lowcal.errors import LowcalError

WAIT_FOR_LOCK = 30.0  # seconds; SQLite has one writer at a time
STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError)


def storage_url(text: str) -> URL:
    """The database that `text` names.

    Raises:
        LowcalError: it is no database that several processes can share, or its driver is not installed.
    """
    try:
        url = make_url(text)
        url.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        example = "sqlite:///sweep.db or postgresql://user@host/name"
        raise LowcalError(f"--storage {text}: is not the URL of a database; as in {example}") from None
    except ImportError as error:
        raise LowcalError(f"--storage {url!r}: needs the Python package '{error.name}'; install it") from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise LowcalError(f"--storage {text}: lives in one process alone; name a file, as in sqlite:///sweep.db")
    return url


@contextmanager
def _one_line(url: URL) -> Iterator[None]:
    """Turns an error of the database into a `LowcalError` of one line."""
    try:
        yield
    except STORAGE_ERRORS as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
        remedy = "check the URL, the server and its rights"
        if "locked" in reason:
            remedy = "another program holds it; end that program, or use a database server for many workers"
        raise LowcalError(f"the sweep's storage {url!r} cannot be used ({reason}); {remedy}") from None


class _Storage(RDBStorage):
    """Optuna's storage for several workers, of which any may die at any time."""

    def __init__(self, url: URL, lease: float) -> None:
        is_sqlite = url.get_backend_name() == "sqlite"
        options = {"connect_args": {"timeout": WAIT_FOR_LOCK, "isolation_level": None}} if is_sqlite else {}
        grace = math.ceil(lease)
        # Optuna takes braces for a template.
        text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        super().__init__(text, options, heartbeat_interval=max(1, grace // 6), grace_period=grace)
        if is_sqlite:  # which has no SELECT FOR UPDATE: without a lock, two workers can take the same trial
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(*STORAGE_ERRORS):  # the next one may reach the database
            super().record_heartbeat(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state == TrialState.RUNNING:  # Optuna never counts a running trial without a heartbeat as stale
            self.record_heartbeat(trial_id)
        return super().set_trial_state_values(trial_id, state, values)


@contextmanager
def open_study(url: URL, name: str, *, objectives: int, lease: float) -> Iterator[optuna.Study]:
    """The study `name` in a database, created if there is none; an error of the database becomes one line.

    Args:
        objectives: how many values are minimised.
        lease: seconds without a heartbeat after which a trial's worker counts as dead.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _one_line(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for tries_left in range(5, -1, -1):
            try:
                storage = _Storage(url, lease)
                directions = [StudyDirection.MINIMIZE] * objectives
                study = optuna.create_study(
                    storage=storage, study_name=name, directions=directions, load_if_exists=True
                )
                break
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise LowcalError(f"the sweep's storage is of another version of Optuna: {reason}") from None
            except STORAGE_ERRORS:  # workers that start together create the tables together
                if not tries_left:
                    raise
                time.sleep(0.2 + 0.3 * random.random())
        try:
            yield study
        finally:
            storage.engine.dispose()
