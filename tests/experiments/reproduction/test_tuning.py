"""Cells whose settings a search finds: what it takes, what it finds, and that it goes on where it stopped."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments.recipe_files import load_recipe, parse_recipe
from lowcal.experiments.reproduce import dry_run, reproduce
from lowcal.experiments.reproduction.found import choose_trial, read_found
from lowcal.experiments.reproduction.plans import TUNED, make_plan
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.scales import SCALES
from lowcal.experiments.reproduction.tuning import plan_search
from lowcal.experiments.sweep import Sweep
from lowcal.training.record import RunFolder

CPU = torch.device("cpu")
SHORT = ["epochs=2", "batch=8", "data.train_images=40", "data.test_images=8", "local.schedule.interval=1"]
CELL = "resnet34-imagenet/local-tuned"


class Diary:
    """A watcher that writes down each epoch, and breaks off after so many of them."""

    def __init__(self, most=None):
        self.notes, self.epochs, self.most = [], [], most

    def note(self, text):
        self.notes.append(text)

    def begin(self, arms, finished, epochs, *, later=0):
        pass

    def step(self, arm, progress):
        pass

    def epoch(self, arm, record):
        self.epochs.append((arm.folder, record["epoch"]))
        if len(self.epochs) == self.most:
            raise KeyboardInterrupt


def row(trial, error, flops, reason=None):
    return {"trial": trial, "top1_error": error, "flops": flops, "reason": reason, "settings": {"local.lr": trial}}


def cell_of(table, name, results):
    return next(cell for cell in make_plan(table, results.base).cells if cell.id == name)


def run(results, diary=None):
    return reproduce("table4", results, seeds=1, cells=CELL, device=CPU, watcher=diary or Diary())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(0, 20.0, 100), row(1, 19.0, 90), row(2, 20.0, 80), row(3, 21.0, 10)], 2),
        ([row(0, 20.0, 100), row(1, 30.0, 10)], 0),
        ([row(0, None, None, "diverged"), row(1, 30.0, 90), row(2, 25.0, 95)], 2),
        ([row(1, 20.0, 100), row(0, 20.0, 100)], 0),
    ],
)
def test_the_cheapest_trial_that_costs_no_accuracy_is_chosen(rows, expected):
    assert choose_trial(rows)["trial"] == expected


def test_without_any_result_nothing_is_chosen():
    assert choose_trial([row(0, None, None, "diverged")]) is None
    assert choose_trial([]) is None


def test_only_a_finished_search_of_the_same_settings_counts(tmp_path):
    searches = ("local.lr=1:2", "local.schedule.c1=13:54")
    summary = {"search": ["local.lr=1.0:2.0", "local.schedule.c1=13.0:54.0"], "rows": [row(0, 20.0, 1), row(1, 9.0, 1)]}
    assert read_found(tmp_path, searches, 2) is None
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, **summary}))
    found = read_found(tmp_path, searches, 2)
    assert (found.settings, found.trial, found.trials) == (("local.lr=1",), 1, 2)
    assert read_found(tmp_path, searches, 3) is None
    assert read_found(tmp_path, searches[:1], 2) is None


def test_a_search_begins_with_the_common_settings_and_any_worker_may_join_it(tmp_path):
    results = Results(tmp_path, SCALES["full"])
    plan = plan_search(results, cell_of("table4", CELL, results))
    assert plan.start == {
        "local.schedule.alpha": 0.95,
        "local.schedule.shift": None,
        "local.schedule.max_fraction": 0.75,
    }
    assert plan.recipe.data.evaluate == "validation"
    recipe, objective = load_recipe("resnet34-imagenet"), "top1_error,flops"
    command = (Path(__file__).parents[3] / "docs" / "reproduce.md").read_text().partition("lowcal sweep --recipe")[2]
    assert tuple(re.findall(r"--search (\S+)", command.partition("```")[0])) == TUNED
    assert str(results.search_folder(cell_of("table4", CELL, results)).relative_to(tmp_path)) in command
    by_hand = Sweep(recipe, "local", TUNED, trials=plan.trials, objective=objective)
    assert by_hand.definition() == plan.definition()
    assert by_hand.study == plan.study


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ([], ["local.schedule.c1", "local.schedule.c2"]),
        (["local.schedule.c1=30"], ["local.schedule.c2"]),
        (["local.schedule.c1=30", " local.schedule.c2 = 0.004"], []),
    ],
)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_what_is_given_is_not_searched(given, left, scale, tmp_path):
    results = Results(tmp_path, SCALES[scale], settings=given)
    for network in ("resnet50", "mobilenet_v2"):
        cell = cell_of("table8", f"{network}-imagenet/local-static", results)
        assert [text.partition("=")[0] for text in results.searches(cell)] == left
        if left:
            plan = plan_search(results, cell)
            schedule = results.recipe(cell).local.schedule
            assert plan.start == {key: getattr(schedule, key.rpartition(".")[2]) for key in left}


def test_settings_are_searched_on_held_out_images_and_the_cell_is_trained_with_them(tmp_path):
    """Broken off in the middle of a trial and taken up again; then called a third time, which trains nothing."""
    results = Results(tmp_path / "out", SCALES["tiny"], settings=SHORT)
    stopped, resumed = Diary(most=3), Diary()
    _, planned = dry_run("table4", results, seeds=1, cells=CELL, device=CPU)
    assert [(entry.seed, entry.state, entry.runs) for entry in planned] == [
        (None, "search: 2 trials of 2 epochs, 4 epochs left", 2),
        (0, "2 epochs", 1),
    ]
    assert planned[0].seconds == 2 * planned[1].seconds > 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt):
        run(results, stopped)
    _, planned = dry_run("table4", results, seeds=1, cells=CELL, device=CPU)
    assert planned[0].state == "search: 2 trials of 2 epochs, 1 epochs left"
    found = run(results, resumed)
    searched = [(trial, epoch) for trial in ("trial-0000-seed0", "trial-0001-seed0") for epoch in (0, 1)]
    cell = cell_of("table4", CELL, results)
    trained = [(results.folder(cell, 0).name, epoch) for epoch in (0, 1)]
    assert stopped.epochs + resumed.epochs == searched + trained

    folder = results.search_folder(cell)
    value = json.loads((folder / "sweep.json").read_text())
    assert value["evaluate"] == "validation"
    assert value["rows"][0]["settings"] == {
        "local.schedule.alpha": 0.95,
        "local.schedule.shift": None,
        "local.schedule.max_fraction": 0.75,
    }
    chosen = choose_trial(value["rows"])
    recipe = parse_recipe(RunFolder.open(results.folder(cell, 0)).recipe, "there")
    assert recipe.data.evaluate == "test"
    for key, setting in chosen["settings"].items():
        assert getattr(recipe.local.schedule, key.rpartition(".")[2]) == setting

    table = json.loads(next(file for file in found.files if file.suffix == ".json").read_text())
    assert table["searched"][CELL]["trial"] == chosen["trial"]
    assert any(note.startswith(f"{CELL}: local.schedule.alpha=") for note in table["notes"])
    again = Diary()
    run(Results(tmp_path / "out", SCALES["tiny"], settings=SHORT), again)
    assert again.epochs == []
    _, planned = dry_run("table4", results, seeds=1, cells=CELL, device=CPU)
    assert [entry.state for entry in planned] == ["finished"]


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    arguments = ["reproduce", "table4", "--scale", "tiny", "--device", "cpu", "--quiet"]
    assert main([*arguments, "--cells", "*tuned"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'lowcal[sweep]'\n")
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_comes_to_nothing_is_said_with_a_way_out(tmp_path):
    results = Results(tmp_path / "out", SCALES["tiny"], settings=[*SHORT, "optimizer.lr=1e30"])
    with pytest.raises(
        LowcalError, match=r"no trial of the search in .*local-tuned-set-\w+-search came to a result.*--set"
    ):
        run(results)
