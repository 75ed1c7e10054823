"""A budget in the command: said before the run, kept to, and said after it."""

import json
from itertools import pairwise

import pytest

from lowcal import LowcalError
from lowcal.commands.common import budget_settings
from lowcal.experiments.train import train
from lowcal.step_times import StepClock
from lowcal.training.distributed import TrainingGroup
from lowcal.training.run import Run

from .test_compare import Diary, recipe, run_compare


def chosen(budget, *settings):
    """A small comparison whose recipe has moves of its own, which the budget replaces."""
    more = ["step=eager", "local.norm_stats=running", "epochs=8"]
    return recipe(*more, *budget_settings(budget), *settings)


@pytest.fixture
def measured(monkeypatch):
    """Steps of known times: what is planned depends on nothing else."""
    monkeypatch.setattr(Run, "step_times", lambda self, boundaries: {b: 1 - b / 16 for b in boundaries})
    monkeypatch.setattr(StepClock, "read", lambda *_, **__: None)


def records(folder):
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def test_it_is_said_before_and_after_the_run(tmp_path, measured):
    diary = Diary()
    run_compare(tmp_path / "out", chosen("1.2x"), ["sgd", "freeze"], diary=diary)
    plan, met = (note for note in diary.notes if "budget" in note)
    path = [record["boundary"] for record in records(tmp_path / "out" / "freeze-seed0")]
    moves = [f"{new} from epoch {epoch} on" for epoch, (old, new) in enumerate(pairwise(path), 2) if old != new]
    assert plan.startswith(f"freeze: budget 1.2x: layers before the boundary: 0, {', '.join(moves)} (of 8 epochs); ")
    assert plan.endswith("expected 1.21x, 19.9 s instead of 24.0 s")  # 8 epochs of 3 steps
    assert met.startswith("freeze-seed0: budget: asked 1.20x, measured ")
    assert met.endswith("x of sgd's speed")
    summary = json.loads((tmp_path / "out" / "freeze-seed0" / "summary.json").read_text())
    assert summary["asked_speedup"] == 1.2
    assert summary["measured_speedup"] == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize(("budget", "nearest"), [("3x", "it is 1."), ("0.01 memory", "takes 0.")])
def test_an_impossible_one_is_refused_before_anything_is_written(tmp_path, budget, nearest):
    with pytest.raises(LowcalError, match="is out of reach") as error:
        run_compare(tmp_path / "out", chosen(budget), ["sgd", "freeze"])
    assert nearest in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_plan(tmp_path, measured, monkeypatch):
    def trained(folder, *, resume=False, epochs=8):
        diary, epoch = Diary(), []

        def stop(arm, record):
            epoch.append(record["epoch"])
            if len(epoch) == epochs:
                raise KeyboardInterrupt

        diary.epoch = stop if epochs < 8 else diary.epoch
        options = {"resume": resume, "data_dir": None, "group": TrainingGroup(), "watcher": diary}
        return train(chosen("1.2x"), "freeze", folder, **options), diary.notes

    whole, notes = trained(tmp_path / "whole")
    assert notes[-1] == "freeze-seed0: budget: asked 1.20x, measured 1.21x by its own step times"
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part", epochs=3)
    monkeypatch.setattr(Run, "step_times", lambda *_: pytest.fail("measured again"))
    again, _ = trained(tmp_path / "part", resume=True)
    assert again["measured_speedup"] == whole["measured_speedup"]
    one, other = (records(tmp_path / name) for name in ("whole", "part"))
    assert [(r["boundary"], r["train_loss"]) for r in one] == [(r["boundary"], r["train_loss"]) for r in other]


@pytest.mark.parametrize("method", ["freeze", "local"])
def test_a_budget_of_memory_is_met_from_the_first_step_on(tmp_path, method):
    diary = Diary()
    run_compare(tmp_path / "out", chosen("0.7 memory", "epochs=2"), ["sgd", method], diary=diary)
    plain, own = (records(tmp_path / "out" / f"{name}-seed0") for name in ("sgd", method))
    parts = [a["peak_memory_bytes"] / b["peak_memory_bytes"] for a, b in zip(own, plain, strict=True)]
    assert parts[0] == parts[1] <= 0.7
    assert len({record["boundary"] for record in own}) == 1
    plan, met = (note for note in diary.notes if "budget" in note)
    boundary, layers = own[0]["boundary"], own[0]["layers"]
    assert plan.startswith(
        f"{method}: budget 0.7 of the memory: {boundary} of {layers} layers before the boundary from"
    )
    assert met == f"{method}-seed0: budget: asked 0.70 of sgd's memory, measured {parts[0]:.2f}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chosen("fast"), "--budget fast: is neither a speed-up nor a part of the memory; write it as in"),
        (lambda: chosen("0.9x"), "local.schedule.speedup=0.9: must be a number, above 1"),
        (lambda: chosen("1.5 memory"), "local.schedule.memory=1.5: must be a number, above 0 and below 1"),
        (lambda: chosen("1.2x", "local.schedule.memory=0.5"), "give speedup or memory, one of the two"),
        (lambda: recipe("local.schedule.speedup=1.2"), "local.schedule.speedup belongs to the schedule 'budget'"),
        (lambda: chosen("1.2x", "model.frozen=2"), "model.frozen=2: a budget decides the boundary by itself"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(LowcalError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
