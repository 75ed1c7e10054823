import csv
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import torch

from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments import ledger as ledger_module
from lowcal.experiments.recipe_text import load_recipe
from lowcal.experiments.search import variants
from lowcal.experiments.sweep import plan_sweep, sweep
from lowcal.training.run import Run

CPU = torch.device("cpu")
SMALL = [
    "epochs=1",
    "batch=16",
    "model.width=4",
    "data={name: synthetic, train_images: 40, test_images: 16, image_size: 8, classes: 2}",
    "local.schedule.interval=1",
]


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
    method = options.pop("method", "local")
    return plan_sweep(load_recipe("digits"), method, searches, settings=[*SMALL, *settings], **options)


def run(made, out, diary=None):
    return sweep(made, out, data_dir=None, device=CPU, watcher=diary or Diary())


def study_of(out):
    return optuna.load_study(study_name="digits-local", storage=f"sqlite:///{out}/sweep.db")


# In one process


def test_a_sweep_trains_each_trial_under_its_settings_and_reports_them(tmp_path):
    out, diary = tmp_path / "out", Diary()
    report = run(plan("local.lr=1e-4:1e-2:log", "local.schedule.shift=1,2", trials=2, seeds=2), out, diary)
    rows = report.summary["rows"]
    assert [row["trial"] for row in rows] == [0, 1]
    assert report.summary["evaluate"] == "validation"
    for row in rows:
        assert 1e-4 <= row["settings"]["local.lr"] <= 1e-2
        assert row["runs"] == [f"trial-{row['trial']:04}-seed{seed}" for seed in (0, 1)]
        summaries = [json.loads((out / name / "summary.json").read_text()) for name in row["runs"]]
        assert row["top1_error"] == pytest.approx(sum(s["top1_error"] for s in summaries) / 2)
        assert row["seconds"] == pytest.approx(sum(s["seconds"] for s in summaries) / 2)
        recipe = (out / row["runs"][1] / "recipe.yaml").read_text()
        assert f"lr: {row['settings']['local.lr']}" in recipe
        assert f"shift: {row['settings']['local.schedule.shift']}" in recipe
        assert "evaluate: validation" in recipe
    assert len(set(diary.epochs)) == len(diary.epochs) == 4
    trials = study_of(out).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    assert [trial.value for trial in trials] == [row["top1_error"] for row in rows]
    assert [trial.params for trial in trials] == [row["settings"] for row in rows]
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["local.lr"]) for line in lines] == [row["settings"]["local.lr"] for row in rows]
    assert (out / "sweep.svg").read_text().startswith("<?xml")
    assert sorted(entry.name for entry in out.iterdir() if entry.is_file()) == [
        "sweep.csv", "sweep.db", "sweep.json", "sweep.md", "sweep.svg",
    ]  # fmt: skip


def test_a_finished_sweep_is_reported_again_and_can_grow(tmp_path):
    out = tmp_path / "out"
    first = run(plan("local.lr=0.1,0.2", trials=1), out).summary["rows"]
    diary = Diary()
    assert run(plan("local.lr=0.1,0.2", trials=1), out, diary).summary["rows"] == first
    assert diary.epochs == []
    rows = run(plan("local.lr=0.1,0.2", trials=2), out, diary).summary["rows"]
    assert rows[0] == first[0]
    assert diary.epochs == [("trial-0001-seed0", 0)]
    with pytest.raises(LowcalError, match="--trials 1: the sweep 'digits-local' has 2 already"):
        run(plan("local.lr=0.1,0.2", trials=1), out)


def test_a_grid_runs_each_combination_once_in_order(tmp_path):
    made = plan("local.schedule.shift=1,2", "local.supervision=true,false", sampler="grid")
    assert made.trials == 4
    rows = run(made, tmp_path / "out").summary["rows"]
    assert [tuple(row["settings"].values()) for row in rows] == [(1, True), (1, False), (2, True), (2, False)]


def test_the_first_trial_has_the_recipes_own_settings_where_they_are_searched(tmp_path):
    own = load_recipe("digits").local
    searches = ("local.lr=1e-4:1e-2:log", "local.schedule.shift=null,1,2")
    rows = run(plan(*searches, trials=2), tmp_path / "out").summary["rows"]
    assert rows[0]["settings"] == {"local.lr": own.lr, "local.schedule.shift": own.schedule.shift}
    assert rows[1]["settings"] != rows[0]["settings"]
    assert plan(*searches, trials=2, sampler="random").start is None
    assert plan(f"local.lr={2 * own.lr}:{20 * own.lr}:log", trials=2).start is None


def test_several_objectives_give_the_trials_that_no_other_beats(tmp_path):
    made = plan("local.schedule.shift=1,2", objective="top1_error,flops", sampler="grid")
    summary = run(made, tmp_path / "out").summary
    points = {row["trial"]: (row["top1_error"], row["flops"]) for row in summary["rows"]}
    assert {trial.number for trial in study_of(tmp_path / "out").best_trials} == set(summary["best"])
    assert summary["best"]
    assert len(points) == 2


def test_a_trial_that_comes_to_nothing_does_not_stop_the_others(tmp_path):
    diary = Diary()
    summary = run(plan("optimizer.lr=1e30,0.01", sampler="grid"), tmp_path / "out", diary).summary
    bad, good = summary["rows"]
    assert "step" in bad["reason"]
    assert bad["top1_error"] is None
    assert good["reason"] is None
    assert summary["best"] == [1]
    assert any("trial 0 gave no result" in note for note in diary.notes)
    assert [trial.state.name for trial in study_of(tmp_path / "out").trials] == ["PRUNED", "COMPLETE"]


def test_settings_that_exclude_one_another_are_a_trial_without_result(tmp_path):
    made = plan("optimizer.momentum=0.9,0.0", "optimizer.nesterov=false,true", sampler="grid")
    reasons = [row["reason"] for row in run(made, tmp_path / "out").summary["rows"]]
    assert [reason is None for reason in reasons] == [True, True, True, False]
    assert "needs a momentum" in reasons[3]


def test_a_full_disk_stops_the_worker_and_the_trial_goes_on_later(tmp_path, monkeypatch):
    out, whole = tmp_path / "out", Run.run_epoch

    def full(run, progress=None):
        raise LowcalError("cannot write checkpoint.pt: No space left on device") from OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "run_epoch", full)
        with pytest.raises(LowcalError, match="No space left"):
            run(plan("local.lr=0.1,0.2", trials=1), out)
    assert Run.run_epoch is whole
    rows = run(plan("local.lr=0.1,0.2", trials=1), out).summary["rows"]
    assert rows[0]["reason"] is None


def test_a_stopped_worker_gives_its_trial_back_and_the_next_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    out, whole, left = tmp_path / "out", Run.run_epoch, [2]

    def run_epoch(run, progress=None):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(run, progress)

    made = plan("local.lr=0.1,0.2", trials=1, settings=["epochs=3"])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "run_epoch", run_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(made, out)
    checkpoints = {path: path.read_bytes() for path in (out / "trial-0000-seed0").glob("checkpoint*")}
    for path in checkpoints:
        path.write_bytes(b"damaged")
    with pytest.raises(LowcalError, match=r"no checkpoint can be used.*; or remove .*trial-0000-seed0"):
        run(made, out)
    for path, data in checkpoints.items():
        path.write_bytes(data)
    diary = Diary()
    run(made, out, diary)
    assert diary.epochs == [("trial-0000-seed0", 2)]
    assert len(study_of(out).trials) == 1


def test_a_killed_workers_trial_is_taken_up_by_another_and_every_trial_is_finished_once(tmp_path, monkeypatch):
    out, whole, left = tmp_path / "out", Run.run_epoch, [2]

    def run_epoch(run, progress=None):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(run, progress)

    made = plan("local.lr=0.1,0.2", trials=2, settings=["epochs=3"], lease=1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "run_epoch", run_epoch)
        patch.setattr(ledger_module.Ledger, "release", lambda *_, **__: True)  # who is killed gives nothing back
        with pytest.raises(KeyboardInterrupt):
            run(made, out)
    diary = Diary()
    rows = run(made, out, diary).summary["rows"]
    # The second worker first takes what is free, and the dead one's trial when the lease has run out.
    expected = [("trial-0001-seed0", epoch) for epoch in range(3)] + [("trial-0000-seed0", 2)]
    assert sorted(diary.epochs) == sorted(expected)
    assert any("trial 0 is taken up again: its worker stopped" in note for note in diary.notes)
    assert [(row["trial"], row["reason"]) for row in rows] == [(0, None), (1, None)]
    assert [trial.state.name for trial in study_of(out).trials] == ["COMPLETE"] * 2


def test_a_trial_that_workers_die_of_is_given_up(tmp_path, monkeypatch):
    out, made = tmp_path / "out", plan("local.lr=0.1,0.2", trials=1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "run_epoch", lambda run, progress=None: 1 / 0)
        for _ in range(ledger_module.MOST_DEATHS):
            with pytest.raises(ZeroDivisionError):
                run(made, out)
    summary = run(made, out).summary
    assert "3 workers in a row" in summary["rows"][0]["reason"]
    assert summary["best"] == []
    assert not (out / "sweep.svg").exists()


def test_a_worker_whose_trial_was_taken_over_lets_go_of_it(tmp_path, monkeypatch):
    out, whole = tmp_path / "out", Run.run_epoch

    def stalled(run, progress=None):
        with closing(sqlite3.connect(out / "sweep.db")) as database:
            database.execute("UPDATE lowcal_trials SET owner='another', beat=99, outcome='{\"reason\": \"x\"}'")
            database.commit()
        return whole(run, progress)

    monkeypatch.setattr(Run, "run_epoch", stalled)
    monkeypatch.setattr("lowcal.experiments.sweep.write_sweep", lambda rows, heading, out: rows)
    diary = Diary()
    assert run(plan("local.lr=0.1,0.2", trials=1), out, diary)[0]["reason"] == "x"
    assert any("trial 0 was left" in note for note in diary.notes)


def test_runs_that_lost_their_storage_are_not_taken_for_others(tmp_path):
    out = tmp_path / "out"
    run(plan("local.lr=0.1,0.2", sampler="grid"), out)
    (out / "sweep.db").unlink()
    with pytest.raises(
        LowcalError, match=r"trial-0000-seed0 was started with another recipe: local.lr \(0.1 there, 0.3"
    ):
        run(plan("local.lr=0.3,0.2", sampler="grid"), out)


def test_the_study_of_another_sweep_is_refused_and_says_what_differs(tmp_path):
    storage = f"sqlite:///{tmp_path}/shared.db"
    first = plan("local.lr=0.1,0.2", trials=1, storage=storage)
    run(first, tmp_path / "one")
    for other, expected in (
        (plan("local.lr=0.1,0.3", trials=1, storage=storage), "its search is local.lr=0.1,0.2, not local.lr=0.1,0.3"),
        (plan("local.lr=0.1,0.2", trials=1, seeds=2, storage=storage), "its seeds is 1, not 2"),
        (plan("local.lr=0.1,0.2", trials=1, storage=storage, settings=["batch=8"]), "batch (16 there, 8 here)"),
        (plan("local.lr=0.1,0.2", trials=1, storage=storage, method="freeze", study="digits-local"), "its method"),
    ):
        with pytest.raises(LowcalError) as error:
            run(other, tmp_path / "two")
        assert expected in str(error.value)
        assert "--study" in str(error.value)
    assert (
        len(run(plan("local.lr=0.1,0.3", trials=1, storage=storage, study="b"), tmp_path / "two").summary["rows"]) == 1
    )


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


# Mistakes

ONE = ["--search", "local.lr=0.1,0.2", "--trials", "1"]
WRONG = {
    "nothing to search": ([], "give --search"),
    "unknown setting": (["--search", "local.lrr=1,2", "--trials", "1"], "did you mean 'local.lr'"),
    "empty range": (["--search", "local.lr=2:1", "--trials", "1"], "the range is empty"),
    "log": (["--search", "local.lr=0:1:log", "--trials", "1"], "begin above 0"),
    "refused value": (["--search", "local.schedule.shift=1,x", "--trials", "1"], "local.schedule.shift=x"),
    "no trials": (ONE[:2], "--trials N"),
    "trials 0": ([*ONE[:2], "--trials", "0"], "--trials 0"),
    "seeds 0": ([*ONE, "--seeds", "0"], "--seeds 0"),
    "lease": ([*ONE, "--lease", "0"], "--lease 0"),
    "method": ([*ONE, "--method", "lokal"], "did you mean 'local'"),
    "method without setting": ([*ONE, "--method", "sgd"], "changes nothing for 'sgd'"),
    "objective": ([*ONE, "--objective", "top1-error"], "did you mean 'top1_error'"),
    "objective twice": ([*ONE, "--objective", "seconds,seconds"], "twice"),
    "sampler": ([*ONE, "--sampler", "gird"], "did you mean 'grid'"),
    "grid of a range": (["--search", "local.lr=1:2", "--sampler", "grid"], "needs a list"),
    "grid and trials": ([*ONE, "--sampler", "grid"], "2 combinations"),
    "storage": ([*ONE, "--storage", "sweep.db"], "no database's URL"),
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
        run(plan("local.lr=0.1,0.2", trials=1), out)


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", *ONE]) == 2
    assert capsys.readouterr().err.endswith("pip install 'lowcal[sweep]'\n")
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_used_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "WAIT_FOR_LOCK", 0.1)
    monkeypatch.setattr(ledger_module.time, "sleep", lambda seconds: None)
    made = plan("local.lr=0.1,0.2", trials=1)
    out = tmp_path / "out"
    out.mkdir()
    with closing(sqlite3.connect(out / "sweep.db")) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LowcalError, match="database is locked"):
            run(made, out)
    run(made, out)


# As processes of their own


def start_worker(out, log, *, epochs, trials):
    options = [part for setting in (*SMALL[1:], f"epochs={epochs}") for part in ("--set", setting)]
    command = [sys.executable, "-u", "-m", "lowcal", "sweep", *options, "--search", "local.lr=1e-4:1e-2:log"]
    command += ["--trials", str(trials), "--lease", "3", "--out", str(out), "--device", "cpu"]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def epochs_in(log):
    """The epochs that a worker has trained, each as (trial, epoch from 1)."""
    return [
        (int(trial), int(epoch)) for trial, epoch in re.findall(r"^trial-(\d+)-seed0 +(\d+)/", log.read_text(), re.M)
    ]


@pytest.mark.slow
def test_two_workers_one_killed_finish_every_trial_once(tmp_path):
    out, logs = tmp_path / "out", [tmp_path / "a.log", tmp_path / "b.log"]
    trials, epochs = 4, 12
    workers = [start_worker(out, log, epochs=epochs, trials=trials) for log in logs]
    try:
        victim, held = None, None
        end = time.monotonic() + 120
        while victim is None:  # the first that has a part of a trial behind it
            assert time.monotonic() < end, [log.read_text() for log in logs]
            time.sleep(0.02)
            for index, log in enumerate(logs):
                found = epochs_in(log)
                if found and 2 <= found[-1][1] <= epochs // 2:
                    victim, held = index, found[-1][0]
                    workers[index].send_signal(signal.SIGKILL)
                    break
        assert workers[victim].wait(30) == -signal.SIGKILL
        assert workers[1 - victim].wait(120) == 0, logs[1 - victim].read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["trial"], row["reason"]) for row in rows] == [(trial, None) for trial in range(trials)]
    for row in rows:
        records = [json.loads(line) for line in (out / row["runs"][0] / "epochs.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records] == list(range(epochs))
    seen = [epoch for log in logs for epoch in epochs_in(log)]
    assert len(set(seen)) == len(seen)  # so the killed worker's trial went on where it stopped
    text = logs[1 - victim].read_text()
    assert f"trial {held} is taken up again" in text
    assert f"trial-{held:04}-seed0: goes on after" in text
    assert [trial.state.name for trial in study_of(out).trials] == ["COMPLETE"] * trials
