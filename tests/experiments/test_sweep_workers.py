"""Workers of a sweep that stop, die or are many, and the database that they share."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import optuna
import pytest

from lowcal.errors import LowcalError
from lowcal.experiments import sweep_storage
from lowcal.experiments.sweep_storage import open_study, storage_url
from lowcal.experiments.sweep_worker import MOST_DEATHS, Worker
from lowcal.training.run import Run

from .sweeps import CPU, SMALL, TWO, Diary, plan, run, states, stop_after, study_of


def test_an_error_of_the_machine_stops_the_worker_and_the_trial_goes_on_later(tmp_path, monkeypatch, unchecked):
    full = LowcalError("cannot write checkpoint.pt: No space left on device")
    full.__cause__ = OSError(28, "No space left")
    restore = stop_after(monkeypatch, 0, full)
    for _ in range(MOST_DEATHS):
        with pytest.raises(LowcalError, match="No space left"):
            run(plan(*TWO, trials=1), tmp_path / "out")
    restore()
    assert run(plan(*TWO, trials=1), tmp_path / "out").summary["rows"][0]["reason"] is None


def test_a_stopped_worker_gives_its_trial_back_and_the_next_continues_from_its_checkpoint(
    tmp_path, monkeypatch, unchecked
):
    out, made = tmp_path / "out", plan(*TWO, trials=1, settings=["epochs=3"])
    restore = stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(made, out)
    restore()
    settings = study_of(out).trials[0].params
    checkpoints = {path: path.read_bytes() for path in (out / "trial-0000-seed0").glob("checkpoint*")}
    for path in checkpoints:
        path.write_bytes(b"damaged")
    with pytest.raises(LowcalError, match=r"no checkpoint can be used.*; or remove .*trial-0000-seed0"):
        run(made, out)
    for path, data in checkpoints.items():
        path.write_bytes(data)
    diary = Diary()
    rows = run(made, out, diary).summary["rows"]
    assert diary.epochs == [("trial-0000-seed0", 2)]
    assert (rows[0]["trial"], rows[0]["settings"]) == (0, settings)
    assert states(out) == ["FAIL", "FAIL", "COMPLETE"]


def test_a_trial_that_workers_die_of_is_given_up(tmp_path, monkeypatch, unchecked):
    out, made = tmp_path / "out", plan(*TWO, trials=1)
    stop_after(monkeypatch, 0, ZeroDivisionError)
    for _ in range(MOST_DEATHS):
        with pytest.raises(ZeroDivisionError):
            run(made, out)
    summary = run(made, out).summary
    assert "3 workers in a row" in summary["rows"][0]["reason"]
    assert summary["best"] == []
    assert not (out / "sweep.svg").exists()


def test_a_killed_workers_trial_is_taken_up_by_another(tmp_path, monkeypatch, unchecked):
    out, made = tmp_path / "out", plan(*TWO, trials=2, settings=["epochs=3"], lease=2)
    restore = stop_after(monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", _unless_failed)
        with pytest.raises(KeyboardInterrupt):
            run(made, out)
    restore()
    assert states(out) == ["RUNNING", "WAITING"]
    diary = Diary()
    rows = run(made, out, diary).summary["rows"]
    # The second worker first takes the free trial, then waits until the heartbeat of the other one is stale.
    expected = [("trial-0001-seed0", epoch) for epoch in range(3)] + [("trial-0000-seed0", 2)]
    assert sorted(diary.epochs) == sorted(expected)
    assert any("trial 0 is taken up again: its worker stopped" in note for note in diary.notes)
    assert [(row["trial"], row["reason"]) for row in rows] == [(0, None), (1, None)]
    assert states(out) == ["FAIL", "COMPLETE", "COMPLETE"]


def _unless_failed(storage, trial_id, state, values=None, _whole=optuna.storages.RDBStorage.set_trial_state_values):
    """As a killed worker, which cannot say that its trial has failed."""
    return state != optuna.trial.TrialState.FAIL and _whole(storage, trial_id, state, values)


def test_a_worker_whose_trial_was_taken_leaves_it(tmp_path, monkeypatch, unchecked):
    out, whole, lost = tmp_path / "out", Run.run_epoch, []

    def stalled(run, progress=None):
        if not lost:
            lost.append(study_of(out).tell(0, state=optuna.trial.TrialState.FAIL))
        return whole(run, progress)

    monkeypatch.setattr(Run, "run_epoch", stalled)
    diary = Diary()
    made = plan(*TWO, trials=1, settings=["epochs=2"])
    assert run(made, out, diary).summary["rows"][0]["reason"] is None
    assert any("trial 0 was left" in note for note in diary.notes)
    assert states(out) == ["FAIL", "COMPLETE"]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # filters are not of a thread
def test_workers_in_a_crowd_train_every_trial_once(tmp_path, monkeypatch):
    made, trained, errors = plan("local.lr=1e-4:1e-2:log", trials=6), [], []
    url = storage_url(f"sqlite:///{tmp_path}/sweep.db")

    def results(worker, number, values):
        trained.append(number)
        time.sleep(0.02)
        return {"reason": None, "top1_error": values["local.lr"]}

    monkeypatch.setattr(Worker, "_results", results)

    def work():
        try:
            with open_study(url, made.study, objectives=1, lease=60) as study:
                worker = Worker(made, tmp_path, study, None, None, None, CPU, Diary())
                worker.work()
                found.append(worker.rows())
        except Exception as error:
            errors.append(error)

    found, threads = [], [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(trained) == list(range(6))
    assert [row["trial"] for row in found[0]] == list(range(6))
    assert found == [found[0]] * 4


@pytest.mark.slow
def test_a_process_that_is_killed_loses_no_epoch(tmp_path):
    out, log, epochs = tmp_path / "out", tmp_path / "log", 12
    settings = [part for setting in (*SMALL[1:], f"epochs={epochs}") for part in ("--set", setting)]
    command = [sys.executable, "-u", "-m", "lowcal", "sweep", "--search", "local.lr=1e-4:1e-2:log", "--trials", "3"]
    command += [*settings, "--lease", "3", "--out", str(out), "--device", "cpu"]
    records = out / "trial-0000-seed0" / "epochs.jsonl"
    with log.open("w") as file, subprocess.Popen(command) as victim:
        while not records.exists() or records.read_text().count("\n") < 3:
            assert victim.poll() is None
            time.sleep(0.02)
        with subprocess.Popen(command, stdout=file, stderr=file) as other:
            victim.kill()
            assert other.wait(120) == 0, log.read_text()
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["trial"], row["reason"]) for row in rows] == [(trial, None) for trial in range(3)]
    for row in rows:
        lines = (out / row["runs"][0] / "epochs.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(epochs))
    assert "trial 0 is taken up again" in log.read_text()
    assert "trial-0000-seed0: goes on after" in log.read_text()
    assert sorted(states(out)) == ["COMPLETE"] * 3 + ["FAIL"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nosuch://host/name", "not the URL of a database"),
        ("sqlite://", "one process alone"),
        ("sqlite:///:memory:", "one process alone"),
        ("oracle+cx_oracle://user:secret@host/name", "needs the Python package 'cx_Oracle'"),
    ],
)
def test_a_storage_that_workers_cannot_share_is_refused(text, expected):
    with pytest.raises(LowcalError) as error:
        storage_url(text)
    assert expected in str(error.value)
    assert "secret" not in str(error.value)


def test_a_database_that_cannot_be_used_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_storage, "WAIT_FOR_LOCK", 0.1)
    monkeypatch.setattr(sweep_storage.time, "sleep", lambda seconds: None)

    def refused(name, expected):
        url = storage_url(f"sqlite:///{tmp_path}/{name}")
        with (
            pytest.raises(LowcalError, match=rf"^[^\n]*{expected}[^\n]*$"),
            open_study(url, "s", objectives=1, lease=60),
        ):
            pass

    with closing(sqlite3.connect(tmp_path / "locked.db")) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        refused("locked.db", "database is locked")
    (tmp_path / "text.db").write_text("not a database at all " * 100)
    refused("text.db", "file is not a database")
    refused("none/sweep.db", "unable to open database file")
