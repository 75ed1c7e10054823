"""Several workers on one table: every trial is finished once, by whoever holds it then."""

import sqlite3
import threading
from contextlib import ExitStack, closing

import pytest

from lowcal.errors import LowcalError
from lowcal.experiments import ledger as module
from lowcal.experiments.ledger import Ledger, storage_url


@pytest.fixture
def url(tmp_path):
    return storage_url(f"sqlite:///{tmp_path}/sweep.db")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", made)
    return made


@pytest.fixture
def two(url):
    """Two workers on a sweep of two trials."""
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Ledger(url, "s", 10.0))) for _ in range(2)]
        for worker in workers:
            assert worker.join("what") == "what"
            worker.grow(2)
        yield workers


def test_a_dead_workers_trial_is_taken_over_with_its_settings_and_a_living_ones_is_not(two, clock):
    dead, other = two
    held = dead.claim()
    assert dead.assign(held.trial, 7, {"a": 0.5, "b": None})
    assert other.claim().trial == 1
    assert other.claim() is None
    clock.now = 9.0
    assert dead.beat(held.trial)
    assert other.beat(1)
    clock.now = 18.0
    assert other.claim() is None  # the beat at 9 is first seen now, as is its own
    assert other.beat(1)
    clock.now = 29.0
    taken = other.claim()
    assert (taken.trial, taken.number, taken.chosen, taken.deaths) == (0, 7, {"a": 0.5, "b": None}, 1)
    # The dead one wakes up: it can do nothing to the trial any more.
    assert not dead.beat(0)
    assert not dead.progress(0)
    assert not dead.release(0, deaths=0)
    assert not dead.finish(0, {"by": "dead"})
    assert other.finish(0, {"by": "other"})
    assert not other.finish(0, {"by": "other again"})
    assert dead.entries()[0].outcome == {"by": "other"}


def test_an_epoch_clears_what_is_held_against_a_trial_and_a_release_frees_it_at_once(two, clock):
    first, second = two
    held = first.claim()
    assert first.release(held.trial, deaths=2)
    again = second.claim()
    assert (again.trial, again.deaths) == (held.trial, 2)
    assert second.progress(again.trial)
    assert second.entries()[0].deaths == 0


def test_two_that_take_over_at_once_do_not_both_succeed(two, clock, url):
    two[0].claim(), two[0].claim()
    with closing(Ledger(url, "s", 10.0)) as third:
        for observer in (two[1], third):
            assert observer.claim() is None
        clock.now = 11.0
        entries = third.entries()
        assert two[1].claim().trial == 0
        third.entries = lambda: entries  # what it saw a moment before
        assert third.claim().trial == 1
        assert third.claim() is None


def test_a_sweep_is_entered_once_and_grows(url):
    with closing(Ledger(url, "s", 10.0)) as first, closing(Ledger(url, "s", 10.0)) as second:
        assert first.join("one") == "one"
        assert second.join("two") == "one"
        first.grow(2)
        second.grow(3)
        second.grow(1)
        assert [entry.trial for entry in first.entries()] == [0, 1, 2]
        assert first.join("one") == "one"
    with closing(Ledger(url, "another", 10.0)) as other:
        assert other.join("two") == "two"
        assert other.entries() == []


def test_workers_in_a_crowd_finish_every_trial_once(url):
    trials, counts, errors = 12, [], []

    def work():
        try:
            with closing(Ledger(url, "s", 600.0)) as ledger:
                ledger.join("what")
                ledger.grow(trials)
                while (entry := ledger.claim()) is not None:
                    assert ledger.assign(entry.trial, entry.trial, {})
                    assert ledger.finish(entry.trial, {"by": ledger.owner})
                    counts.append(entry.trial)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(counts) == list(range(trials))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sweep.db", "no database's URL"),
        ("nosuch://host/name", "no database's URL"),
        ("sqlite://", "one process alone"),
        ("sqlite:///:memory:", "one process alone"),
        ("oracle+cx_oracle://user:secret@host/name", "needs the Python package 'cx_Oracle'"),
    ],
)
def test_a_storage_that_cannot_be_one_is_refused(text, expected):
    with pytest.raises(LowcalError) as error:
        storage_url(text)
    assert expected in str(error.value)
    assert "secret" not in str(error.value)


def test_a_storage_that_is_locked_damaged_or_away_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT_FOR_LOCK", 0.1)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def refused(name, expected):
        url = storage_url(f"sqlite:///{tmp_path}/{name}")
        with closing(Ledger(url, "s", 10.0)) as ledger, pytest.raises(LowcalError) as error:
            ledger.join("what")
        assert expected in str(error.value)
        assert "\n" not in str(error.value)

    with closing(sqlite3.connect(tmp_path / "locked.db")) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        refused("locked.db", "database is locked")
    (tmp_path / "text.db").write_text("not a database at all " * 100)
    refused("text.db", "file is not a database")
    refused("none/sweep.db", "unable to open database file")
