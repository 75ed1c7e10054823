import csv
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import torch

from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments import sweep_storage
from lowcal.experiments.recipe_text import load_recipe
from lowcal.experiments.search_space import variants
from lowcal.experiments.sweep import Sweep, sweep
from lowcal.experiments.sweep_storage import open_study, storage_url
from lowcal.experiments.sweep_worker import MOST_DEATHS, Worker
from lowcal.training.run import Run

CPU = torch.device("cpu")
SMALL = [
    "epochs=1",
    "batch=16",
    "model.width=4",
    "data={name: synthetic, train_images: 40, test_images: 16, image_size: 8, classes: 2}",
    "local.schedule.interval=1",
]
TWO = ("local.lr=0.1,0.2",)  # the shortest search


class Diary:
    """A watcher that writes down the notes and the epochs."""

    def __init__(self):
        self.notes, self.epochs = [], []

    def note(self, text):
        self.notes.append(text)

    def begin(self, arms, finished, epochs, *, later=0):
        pass

    def step(self, arm, progress):
        pass

    def epoch(self, arm, record):
        self.epochs.append((arm.folder, record["epoch"]))


def plan(*searches, settings=(), **options):
    return Sweep(
        load_recipe("digits"), options.pop("method", "local"), searches, settings=[*SMALL, *settings], **options
    )


def run(made, out, diary=None):
    return sweep(made, out, data_dir=None, device=CPU, watcher=diary or Diary())


def study_of(out):
    return optuna.load_study(study_name="digits-local", storage=f"sqlite:///{out}/sweep.db")


def states(out):
    return [trial.state.name for trial in study_of(out).trials]


def stop_after(monkeypatch, epochs, error=KeyboardInterrupt):
    """Lets the runs train for so many epochs, then raises `error`; returns what undoes it."""
    whole, left = Run.run_epoch, [epochs]

    def run_epoch(run, progress=None):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return whole(run, progress)

    monkeypatch.setattr(Run, "run_epoch", run_epoch)
    return lambda: monkeypatch.setattr(Run, "run_epoch", whole)


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the trial builds of the network, which take half the time of a short sweep."""
    for module in ("sweep", "sweep_worker"):
        monkeypatch.setattr(f"lowcal.experiments.{module}.check", lambda *arguments: None)


# One worker

SEARCHES = ("local.lr=1e-4:1e-2:log", "local.schedule.shift=null,1,2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep: its folder, its summary and what its worker said."""
    out, diary = tmp_path_factory.mktemp("sweep") / "out", Diary()
    return out, run(plan(*SEARCHES, trials=2, seeds=2), out, diary).summary, diary


def test_a_sweep_trains_each_trial_under_its_settings_and_reports_them(finished):
    out, summary, diary = finished
    rows = summary["rows"]
    assert [row["trial"] for row in rows] == [0, 1]
    assert summary["evaluate"] == "validation"
    for row in rows:
        assert 1e-4 <= row["settings"]["local.lr"] <= 1e-2
        assert row["runs"] == [f"trial-{row['trial']:04}-seed{seed}" for seed in (0, 1)]
        results = [json.loads((out / name / "summary.json").read_text()) for name in row["runs"]]
        for name in ("top1_error", "seconds"):
            assert row[name] == pytest.approx((results[0][name] + results[1][name]) / 2)
        recipe = (out / row["runs"][1] / "recipe.yaml").read_text()
        assert f"lr: {row['settings']['local.lr']}" in recipe
        assert "evaluate: validation" in recipe
    assert len(set(diary.epochs)) == len(diary.epochs) == 4
    trials = study_of(out).trials
    assert states(out) == ["COMPLETE"] * 2
    assert [trial.value for trial in trials] == [row["top1_error"] for row in rows]
    assert [trial.params for trial in trials] == [row["settings"] for row in rows]
    with (out / "sweep.csv").open() as file:
        assert [float(line["local.lr"]) for line in csv.DictReader(file)] == [
            row["settings"]["local.lr"] for row in rows
        ]
    files = sorted(entry.name for entry in out.iterdir() if entry.is_file())
    assert files == ["sweep.csv", "sweep.db", "sweep.json", "sweep.md", "sweep.svg"]


def test_the_first_trial_has_the_recipes_own_settings_where_they_are_searched(finished):
    own, (first, second) = load_recipe("digits").local, finished[1]["rows"]
    assert first["settings"] == {"local.lr": own.lr, "local.schedule.shift": own.schedule.shift}
    assert second["settings"] != first["settings"]
    assert plan(*SEARCHES, trials=2, sampler="random").start is None
    assert plan(f"local.lr={2 * own.lr}:{20 * own.lr}:log", trials=2).start is None


def test_a_finished_sweep_grows_and_what_a_worker_chooses_depends_on_the_seed_alone(finished, tmp_path, unchecked):
    out, summary, _ = finished
    shutil.copytree(out, tmp_path / "grown")
    diary = Diary()
    rows = run(plan(*SEARCHES, trials=3, seeds=2), tmp_path / "grown", diary).summary["rows"]
    assert rows[:2] == summary["rows"]
    assert diary.epochs == [("trial-0002-seed0", 0), ("trial-0002-seed1", 0)]
    for name in ("sweep.db", "trial-0002-seed0", "trial-0002-seed1"):
        (shutil.rmtree if name.startswith("trial") else os.remove)(tmp_path / "grown" / name)
    diary = Diary()
    again = run(plan(*SEARCHES, trials=2, seeds=2), tmp_path / "grown", diary).summary["rows"]
    assert [row["settings"] for row in again] == [row["settings"] for row in rows[:2]]
    assert diary.epochs == []  # the runs of the lost database are found again


def test_another_sweep_in_the_same_place_is_refused_and_the_message_says_what_differs(finished, unchecked):
    out = finished[0]
    for other, expected in (
        (plan(*SEARCHES, trials=1, seeds=2), "--trials 1: the sweep 'digits-local' has 2 already"),
        (
            plan(SEARCHES[0], trials=2, seeds=2),
            "its search is local.lr=0.0001:0.01:log local.schedule.shift=null,1,2, not",
        ),
        (plan(*SEARCHES, trials=2), "its seeds is 2, not 1"),
        (plan(*SEARCHES, trials=2, seeds=2, settings=["batch=8"]), "batch (16 there, 8 here)"),
        (plan(*SEARCHES, trials=2, seeds=2, method="freeze", study="digits-local"), "its method is local, not freeze"),
        (plan(*TWO, trials=2, study="new"), r"trial-0000-seed0 was started with another recipe"),
    ):
        with pytest.raises(LowcalError) as error:
            run(other, out)
        assert expected in str(error.value)
    optuna.create_study(study_name="mine", storage=f"sqlite:///{out}/sweep.db").enqueue_trial({})
    with pytest.raises(LowcalError, match="another program; choose another --study"):
        run(plan(*SEARCHES, trials=2, seeds=2, study="mine"), out)


def test_a_grid_runs_each_combination_once_in_order(tmp_path):
    searches = ("optimizer.momentum=0.9,0.0", "optimizer.nesterov=false,true")
    made = plan(*searches, objective="top1_error,flops", sampler="grid")
    summary = run(made, tmp_path / "out").summary
    rows = summary["rows"]
    assert [tuple(row["settings"].values()) for row in rows] == [(0.9, False), (0.9, True), (0.0, False), (0.0, True)]
    assert [row["reason"] is None for row in rows] == [True, True, True, False]
    assert "needs a momentum" in rows[3]["reason"]  # settings that exclude one another are a trial without result
    points = {row["trial"]: (row["top1_error"], row["flops"]) for row in rows[:3]}
    beaten = {
        n for n, one in points.items() if any(a != one and a[0] <= one[0] and a[1] <= one[1] for a in points.values())
    }
    assert summary["best"] == sorted(set(points) - beaten)
    assert states(tmp_path / "out") == ["COMPLETE"] * 3 + ["PRUNED"]


def test_a_trial_that_diverges_does_not_stop_the_others(tmp_path, unchecked):
    diary = Diary()
    summary = run(plan("optimizer.lr=1e30,0.01", sampler="grid"), tmp_path / "out", diary).summary
    bad, good = summary["rows"]
    assert "step" in bad["reason"]
    assert (bad["top1_error"], good["reason"], summary["best"]) == (None, None, [1])
    assert any("trial 0 gave no result" in note for note in diary.notes)


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


# Several workers


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


# Documented commands and mistakes

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()
COMMANDS = re.findall(r"^lowcal sweep --(?:[^\n]*\\\n)*[^\n]*$", DOCUMENT, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_commands_are_valid(command, monkeypatch, tmp_path):
    planned = []

    def stop(made, out, **options):
        planned.append(made)
        raise LowcalError("not run here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowcal.experiments.sweep.sweep", stop)
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 2
    assert planned[0].trials >= 2
    assert all(other for _, other in variants(planned[0].recipe, planned[0].searches))
    assert len(COMMANDS) >= 7


ONE = ["--search", "local.lr=0.1,0.2", "--trials", "1"]
WRONG = {
    "nothing to search": ([], "give --search"),
    "unknown setting": (["--search", "local.lrr=1,2", "--trials", "1"], "did you mean 'local.lr'"),
    "refused value": (["--search", "local.schedule.shift=1,x", "--trials", "1"], "local.schedule.shift=x"),
    "no trials": (ONE[:2], "--trials N"),
    "trials 0": ([*ONE[:2], "--trials", "0"], "--trials 0"),
    "seeds 0": ([*ONE, "--seeds", "0"], "--seeds 0"),
    "lease": ([*ONE, "--lease", "1"], "--lease 1: must be at least 2"),
    "method": ([*ONE, "--method", "lokal"], "did you mean 'local'"),
    "method without setting": ([*ONE, "--method", "sgd"], "changes nothing for 'sgd'"),
    "objective": ([*ONE, "--objective", "top1-error"], "did you mean 'top1_error'"),
    "objective twice": ([*ONE, "--objective", "seconds,seconds"], "twice"),
    "sampler": ([*ONE, "--sampler", "gird"], "did you mean 'grid'"),
    "grid of a range": (["--search", "local.lr=1:2", "--sampler", "grid"], "needs a list"),
    "grid and trials": ([*ONE, "--sampler", "grid"], "2 combinations"),
    "storage": ([*ONE, "--storage", "sweep.db"], "not the URL of a database"),
    "too many layers": (
        ["--search", "local.schedule.epochs={1: 1},{1: 99}", "--trials", "1", "--set", "local.schedule.name=fixed"],
        "with local.schedule.epochs={1: 99}",
    ),
    "batch": (["--search", "batch=8,1000", "--trials", "1"], "with batch=1000"),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=list(WRONG))
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, expected, capsys):
    monkeypatch.chdir(tmp_path)
    leave = {"epochs=1"} | ({"batch=16"} if "batch" in str(arguments) else set())
    settings = [part for setting in SMALL if setting not in leave for part in ("--set", setting)]
    if "fixed" in str(arguments):
        settings = settings[:-2]
    assert main(["sweep", *settings, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowcal: ")
    assert error.count("\n") == 1
    assert expected in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "strangers", "run"])
def test_a_folder_that_is_no_sweep_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        for name in ["thesis.tex"] if kind == "strangers" else ["recipe.yaml", "environment.json", "epochs.jsonl"]:
            (out / name).write_text("mine")
    with pytest.raises(LowcalError, match="choose another --out"):
        run(plan(*TWO, trials=1), out)


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", *ONE]) == 2
    assert capsys.readouterr().err.endswith("pip install 'lowcal[sweep]'\n")
    assert list(tmp_path.iterdir()) == []


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
