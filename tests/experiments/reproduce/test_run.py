"""`lowcal reproduce` end to end on a small network, with interruptions and searches, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments.recipe_text import load_recipe, parse_recipe
from lowcal.experiments.reproduce.paper import table_names
from lowcal.experiments.reproduce.results import Results
from lowcal.experiments.reproduce.run import dry_run, plan_search, reproduce
from lowcal.experiments.sweep import Sweep
from lowcal.report.runs import read_run
from lowcal.training.environment import code_digest
from lowcal.training.run_folder import RunFolder

CPU = torch.device("cpu")
VGG = "vgg13-cifar10"
TWO = f"{VGG}/sgd,{VGG}/local"
TUNED = "resnet34-imagenet/local-tuned"
SHORT = ["model.name=resnet8", "model.width=2", "epochs=2", "data.train_images=40", "data.test_images=8"]
SMALL = [*SHORT, "batch=8", "local.schedule.interval=1"]


class Diary:
    """A watcher that writes down each epoch, and breaks off after so many of them."""

    def __init__(self, most=None):
        self.notes, self.epochs, self.most = [], [], most

    def note(self, text):
        self.notes.append(text)

    def stage(self, text, done=0, total=0):
        pass

    def begin(self, arms, finished, epochs, *, later=0):
        self.later = later

    def step(self, arm, progress):
        pass

    def epoch(self, arm, record):
        self.epochs.append((arm.folder, record["epoch"]))
        if len(self.epochs) == self.most:
            raise KeyboardInterrupt


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "out", "tiny", settings=SMALL)


def run(name, results, diary=None, *, seeds=1, cells=None):
    table, files = reproduce(name, results, seeds=seeds, cells=cells, device=CPU, watcher=diary or Diary())
    return table, json.loads(files[2].read_text())


def interrupt(name, results, diary, *, cells):
    with pytest.raises(KeyboardInterrupt):
        run(name, results, diary, cells=cells)


def states(name, results, *, seeds=1, cells=None):
    _, entries = dry_run(name, results, seeds=seeds, cells=cells, device=CPU)
    return [(entry.cell, entry.seed, entry.state) for entry in entries]


def refusal(capsys, *arguments):
    """The one line that the command ends with."""
    assert main(["reproduce", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_table_from_the_command_line(tmp_path, capsys):
    """Table 3: its three cells are trained; run again, it trains nothing."""
    out = tmp_path / "out"
    arguments = ["reproduce", "table3", "--scale", "tiny", "--out", str(out), "--device", "cpu"]
    arguments += [part for setting in SHORT for part in ("--set", setting)] + ["--set", "batch=3"]
    assert main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"resnet50-imagenet/sgd-batch-12 +seed 0 +2 epochs, at most [\d.]+ s", text)
    assert "3 runs, at most" in text
    assert not out.exists()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "Table 3, growing the batch (scale tiny, --set model.name=resnet8, --set" in text
    assert "synthetic images: not the paper's experiment)" in text
    (path,) = out.glob("table3-tiny-set-*.json")
    value = json.loads(path.read_text())
    rows = {row["strategy"]: row for row in value["rows"]}
    assert [row["paper_speedup"] for row in value["rows"]] == [1.0, 1.27, 1.34]
    assert rows["sgd, fixed batch"]["speedup"] == 1
    assert rows["local, growing batch"]["speedup"] > 0
    assert {row["first_batch"] for row in value["rows"]} == {12}
    assert 0 <= rows["local, fixed batch"]["top1_error"] <= 100
    assert not any("in turn" in note for note in value["notes"])
    assert "growing batch" in path.with_suffix(".md").read_text()
    assert "growing batch" in path.with_suffix(".csv").read_text()
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("\nTable 3")
    assert json.loads(path.read_text()) == value


def test_figure4_shows_how_the_batch_grew(tmp_path):
    settings = ["batch.memory_limit=1GiB", "local.schedule={name: fixed, epochs: {1: 3}}", *SHORT, "epochs=3"]
    table, _ = run("figure4", Results(tmp_path / "out", "tiny", settings=[*settings, "batch=4"]))
    rows = {row["strategy"]: (row["first_batch"], row["last_batch"], row["growth_epoch"]) for row in table.rows}
    assert rows == {
        "sgd": (4, 4, None),
        "local": (4, 4, None),
        "local, prose": (4, 4, None),
        "local, growing batch": (4, 8, 3),
    }
    assert len(list((tmp_path / "out").glob("figure4-*-batch.*"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_table_and_figure_end_to_end(tmp_path):
    out = tmp_path / "out"
    for name in table_names():
        assert main(["reproduce", name, "--scale", "tiny", "--out", str(out), "--device", "cpu", "--quiet"]) == 0
        value = json.loads((out / f"{name}-tiny.json").read_text())
        assert {row["state"] for row in value["rows"]} <= {"", "never as good", "none within", "not in turn"}
        assert "not the paper's experiment" in (out / f"{name}-tiny.md").read_text()
    pictures = {path.name for path in out.glob("*.svg")}
    assert {"figure3-tiny-boundary.svg", "figure4-tiny-memory.svg"} <= pictures
    assert {f"figure5-tiny-frontier-{n}-imagenet.svg" for n in ("resnet50", "mobilenet_v2")} <= pictures
    assert "table7-tiny-frontier-resnet18-cifar10.svg" in pictures


def test_an_interrupted_run_goes_on_and_tables_share_it(results):
    """A dry run lists what is left; runs of other code are named, in the notes and below the table."""
    assert states("table2", results, seeds=2, cells=TWO) == [
        (f"{VGG}/{method}", seed, "2 epochs") for method in ("sgd", "local") for seed in (0, 1)
    ]
    assert not results.out.exists()
    stopped, resumed, other = Diary(most=3), Diary(), Diary()
    interrupt("table2", results, stopped, cells=TWO)
    left = [state for _, _, state in states("table2", results, cells=TWO)]
    assert left == ["1 of 2 epochs done", "2 of 2 epochs done"]
    for path in results.group(VGG).glob("*/environment.json"):
        environment = json.loads(path.read_text())
        assert environment["code"] == code_digest()
        path.write_text(json.dumps({**environment, "code": "0123456789ab"}))
    table, value = run("table2", results, resumed, cells=TWO)
    epochs = [(folder.partition("-")[0], epoch) for folder, epoch in sorted(stopped.epochs + resumed.epochs)]
    assert epochs == [("local", 0), ("local", 1), ("sgd", 0), ("sgd", 1)]
    named = [note for note in resumed.notes if note.startswith("made by other code")]
    assert len(named) == 2
    assert all(code_digest() in note and "(0123456789ab)" in note for note in named)
    both = f"0123456789ab+{code_digest()}"
    codes = {run.code for run in map(read_run, results.group(VGG).glob("*-seed0"))}
    assert codes == {entry["code"] for entry in value["runs"].values()} == {"0123456789ab", both}
    assert both in next(note for note in table.notes if "different code" in note)
    run("table5", results, other, cells=VGG)
    assert [folder[:18] for folder, _ in other.epochs] == ["local-unsupervised"] * 2
    assert any("1 of 2 runs are finished already" in note for note in other.notes)


def test_runs_of_one_network_and_seed_take_turns(results):
    diary = Diary()
    table, _ = run("table2", results, diary, seeds=2, cells=TWO)
    methods = [(folder.partition("-")[0], folder[-1], epoch) for folder, epoch in diary.epochs]
    assert methods == [
        *(("sgd", "0", 0), ("local", "0", 0), ("local", "0", 1), ("sgd", "0", 1)),
        *(("sgd", "1", 0), ("local", "1", 0), ("local", "1", 1), ("sgd", "1", 1)),
    ]
    row = next(row for row in table.rows if row["cell"] == f"{VGG}/local")
    assert row["seeds"] == 2
    assert row["speedup_std"] is not None
    assert "a to b: the lower and the higher of two seeds." in table.notes
    recipe = results.folder(results.cell(VGG, "sgd"), 0) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.05", "lr: 0.07"))
    with pytest.raises(LowcalError, match=r"another recipe: optimizer\.lr \(0\.07 there, 0\.05 here\)"):
        run("table2", results, cells=TWO)


def test_settings_are_searched_on_held_out_images_and_the_cell_is_trained_with_them(results):
    """Interrupted in the middle of a trial and taken up again; then called a third time, which trains nothing."""
    stopped, resumed, again = Diary(most=3), Diary(), Diary()
    _, planned = dry_run("table4", results, seeds=1, cells=TUNED, device=CPU)
    assert [(entry.seed, entry.state, entry.runs) for entry in planned] == [
        (None, "search: 2 trials of 2 epochs, 4 epochs left", 2),
        (0, "2 epochs", 1),
    ]
    assert planned[0].seconds == 2 * planned[1].seconds > 0
    interrupt("table4", results, stopped, cells=TUNED)
    assert states("table4", results, cells=TUNED)[0][2] == "search: 2 trials of 2 epochs, 1 epochs left"
    _, value = run("table4", results, resumed, cells=TUNED)
    cell = results.cell("resnet34-imagenet", "local-tuned")
    searched = [(trial, epoch) for trial in ("trial-0000-seed0", "trial-0001-seed0") for epoch in (0, 1)]
    trained = [(results.folder(cell, 0).name, epoch) for epoch in (0, 1)]
    assert stopped.epochs + resumed.epochs == searched + trained
    sweep = json.loads((results.search_folder(cell) / "sweep.json").read_text())
    assert sweep["evaluate"] == "validation"
    settings = {row["trial"]: row["settings"] for row in sweep["rows"]}
    keys = [f"local.schedule.{key}" for key in ("alpha", "shift", "max_fraction")]
    assert settings[0] == dict(zip(keys, (0.95, None, 0.75), strict=True))
    recipe = parse_recipe(RunFolder.open(results.folder(cell, 0)).recipe, "there")
    assert recipe.data.evaluate == "test"
    chosen = settings[value["searched"][TUNED]["trial"]]
    assert {key: getattr(recipe.local.schedule, key.rpartition(".")[2]) for key in keys} == chosen
    assert any(note.startswith(f"{TUNED}: local.schedule.alpha=") for note in value["notes"])
    run("table4", Results(results.out, "tiny", settings=SMALL), again, cells=TUNED)
    assert again.epochs == []
    assert states("table4", results, cells=TUNED) == [(TUNED, 0, "finished")]


def trial(number, error, flops, reason=None):
    return {"trial": number, "top1_error": error, "flops": flops, "reason": reason, "settings": {"local.lr": number}}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([trial(0, 20.0, 100), trial(1, 19.0, 90), trial(2, 20.0, 80), trial(3, 21.0, 10)], 2),
        ([trial(0, 20.0, 100), trial(1, 30.0, 10)], 0),
        ([trial(0, None, None, "diverged"), trial(1, 30.0, 90), trial(2, 25.0, 95)], 2),
        ([trial(1, 20.0, 100), trial(0, 20.0, 100)], 0),
        ([trial(0, None, None, "diverged"), trial(1, None, None, "diverged")], None),
        ([trial(0, 20.0, 100)], None),  # of two
    ],
)
def test_the_cheapest_trial_that_costs_no_accuracy_is_taken(rows, expected, tmp_path):
    results = Results(tmp_path, "tiny", settings=["local.schedule.c2=0.1"])
    cell = results.cell("resnet50-imagenet", "local-static")
    assert results.found(cell) is None
    path = results.search_folder(cell) / "sweep.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 1, "search": ["local.schedule.c1=13.0:54.0"], "rows": rows}))
    found = results.found(cell)
    assert (found and (found.settings, found.trial)) == (
        expected if expected is None else ((f"local.lr={expected}",), expected)
    )
    path.write_text(json.dumps({"format": 1, "search": ["local.schedule.c1=13.0:53.0"], "rows": rows}))
    assert results.found(cell) is None


def test_a_search_can_be_joined_by_the_command_in_the_documentation(tmp_path):
    results = Results(tmp_path, "full")
    cell = results.cell("resnet34-imagenet", "local-tuned")
    plan = plan_search(results, cell)
    assert list(plan.start.values()) == [0.95, None, 0.75]
    text = (Path(__file__).parents[3] / "docs" / "reproduce.md").read_text()
    command = text.partition("lowcal sweep --recipe")[2].partition("```")[0]
    searches = tuple(re.findall(r"--search (\S+)", command))
    assert searches == cell.searches
    assert str(results.search_folder(cell).relative_to(tmp_path)) in command
    recipe = load_recipe("resnet34-imagenet")
    by_hand = Sweep(recipe, "local", searches, trials=plan.trials, objective="top1_error,flops")
    assert (by_hand.definition(), by_hand.study) == (plan.definition(), plan.study)


def test_a_search_without_a_result_is_one_line_with_a_remedy(tmp_path):
    results = Results(tmp_path / "out", "tiny", settings=[*SMALL, "optimizer.lr=1e30"])
    with pytest.raises(LowcalError, match=r"no trial of the search in .*local-tuned-set-\w+-search has .*--set"):
        run("table4", results, cells=TUNED)


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    line = refusal(capsys, "table4", "--scale", "tiny", "--device", "cpu", "--quiet", "--cells", "*tuned")
    assert line.endswith("pip install 'lowcal[sweep]'\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel2"], "unknown table 'tabel2'; did you mean 'table2'?"),
        (["table9", "--dry-run"], "unknown table 'table9'"),
        (["table2", "--scale", "tinny"], "unknown scale 'tinny'; did you mean 'tiny'?"),
        (["table2", "--scale", "tiny", "--cells", "vgg13-cifar1"], "did you mean 'vgg13-cifar10"),
        (["table2", "--seeds", "0"], "see: lowcal reproduce --help"),
        (["table2", "--set", "epoch=3"], "unknown setting 'epoch'; did you mean 'epochs'?"),
        (["table2", "--device", "tpu"], "unknown device 'tpu'"),
        (["table1"], "needs ImageNet: give its folder with --data-dir"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    arguments = ["table2", "--scale", "tiny", "--out", str(tmp_path), "--device", "cpu"]
    (tmp_path / "letter.txt").write_text("dear")
    assert "is not a results folder of lowcal reproduce (it holds 'letter.txt')" in refusal(capsys, *arguments)
    (tmp_path / "reproduce.json").write_text('{"format": 1, "lowcal": "0.0.0"}')
    assert "holds results of lowcal 0.0.0, this is" in refusal(capsys, *arguments)
    assert "holds results of lowcal 0.0.0, this is" in refusal(capsys, *arguments, "--dry-run")


def test_damaged_data_is_refused_before_anything_is_written(tmp_path, capsys):
    files = tmp_path / "data" / "cifar-10-batches-py"
    files.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (files / name).write_text("damaged")
    arguments = ["table2", "--scale", "tiny", "--cells", f"{VGG}/sgd", "--device", "cpu"]
    line = refusal(capsys, *arguments, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert (
        "cifar-10-batches-py/data_batch_1 is damaged: its MD5 checksum is not c99cafc152244af753f735de768cd75f" in line
    )
    assert "replace it" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["table1", "table4"])
def test_a_folder_of_too_few_classes_is_not_the_papers_data(table, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in [f"{split}/{label}" for split in ("train", "val") for label in ("n1", "n2")]:
        (tmp_path / "data" / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (9 * number, 0, 0)).save(tmp_path / "data" / place / f"{number}.jpg")
    settings = ["data.train_images=8", "data.test_images=4", "batch=2", "data.workers=0"]
    arguments = [table, "--cells", "resnet34-imagenet/local*", "--device", "cpu", "--data-dir", "data", "--out", "out"]
    line = refusal(capsys, *arguments, *(part for setting in settings for part in ("--set", setting)))
    assert "'data' holds 2 class folders, but data 'imagenet' has 1000: give another --data-dir" in line
    assert not (tmp_path / "out").exists()


def test_data_is_found_under_its_name_or_as_the_whole_folder(tmp_path):
    whole, several = tmp_path / "whole", tmp_path / "several"
    whole.mkdir()
    (several / "cifar10").mkdir(parents=True)
    assert Results(tmp_path, "full", data_dir=whole).images("resnet50-imagenet") == whole
    assert Results(tmp_path, "full", data_dir=several).images(VGG) == several / "cifar10"
    assert Results(tmp_path, "full").images(VGG) is None
    with pytest.raises(LowcalError, match="has no folder 'cifar100'"):
        Results(tmp_path, "full", data_dir=several).images("vgg13-cifar100")
    with pytest.raises(LowcalError, match="needs ImageNet"):
        Results(tmp_path, "full", data_dir=several).images("resnet50-imagenet")
    results = Results(tmp_path, "tiny", data_dir=several)
    assert (results.is_synthetic(VGG), results.is_synthetic("resnet50-imagenet")) == (False, True)
    assert results.base(VGG).data.name == "cifar10"
    sizes = Results(tmp_path, "tiny", data_dir=whole).base("vgg13-cifar100").data
    assert (sizes.train_images, sizes.test_images) == (500, 100)  # of which a fifth can be held out
