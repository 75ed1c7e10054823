"""A sweep by one worker: what it chooses, trains and reports; the documented commands, and mistakes."""

import csv
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import optuna
import pytest

from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments.recipe_text import load_recipe
from lowcal.experiments.search_space import variants

from .sweeps import SMALL, TWO, Diary, plan, run, states, study_of

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
