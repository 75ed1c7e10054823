"""`lowcal reproduce` end to end on the smallest scale, and what it refuses."""

import json
import re

import pytest
import torch
from PIL import Image

from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments.reproduce import dry_run, reproduce
from lowcal.experiments.reproduction.plans import make_plan, plan_names
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.scales import SCALES
from lowcal.report.runs import read_run
from lowcal.training.environment import code_digest

CPU = torch.device("cpu")
TWO = "vgg13-cifar10/sgd,vgg13-cifar10/local"
SHORT = ["epochs=2", "data.train_images=16", "data.test_images=8", "model.width=4"]


class Diary:
    """A watcher that writes down each epoch, and breaks off after so many of them."""

    def __init__(self, most=None):
        self.notes, self.epochs, self.most = [], [], most

    def note(self, text):
        self.notes.append(text)

    def begin(self, arms, finished, epochs, *, later=0):
        self.later = later

    def step(self, arm, progress):
        pass

    def epoch(self, arm, record):
        self.epochs.append((arm.folder, record["epoch"]))
        if len(self.epochs) == self.most:
            raise KeyboardInterrupt


def run(name, results, diary=None, *, seeds=1, cells=None):
    return reproduce(name, results, seeds=seeds, cells=cells, device=CPU, watcher=diary or Diary())


def refusal(capsys, *arguments):
    """The one line that the command ends with."""
    assert main(["reproduce", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_table_end_to_end(tmp_path, capsys):
    """Table 3: its three cells are trained; run again, it trains nothing."""
    out = tmp_path / "out"
    arguments = ["reproduce", "table3", "--scale", "tiny", "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "Table 3, growing the batch (scale tiny, synthetic images: not the paper's experiment)" in text
    assert "Not built yet" not in text
    value = json.loads((out / "table3-tiny.json").read_text())
    rows = {row["strategy"]: row for row in value["rows"]}
    assert [row["paper_speedup"] for row in value["rows"]] == [1.0, 1.27, 1.34]
    assert rows["sgd, fixed batch"]["speedup"] == 1
    assert rows["local, fixed batch"]["speedup"] > 0
    assert rows["local, growing batch"]["speedup"] > 0
    assert {(row["first_batch"], row["last_batch"]) for row in value["rows"]} == {(64, 64)}  # all images there are
    assert 0 <= rows["local, fixed batch"]["top1_error"] <= 100
    assert not any("in turn" in note for note in value["notes"])
    for kind in ("md", "csv"):
        assert "growing batch" in (out / f"table3-tiny.{kind}").read_text()
    assert main([*arguments, "--quiet"]) == 0
    again = capsys.readouterr().out
    assert json.loads((out / "table3-tiny.json").read_text()) == value
    assert again.startswith("\nTable 3")


def test_figure4_shows_how_the_batch_grew(tmp_path):
    settings = ["batch.memory_limit=1GiB", "local.schedule={name: fixed, epochs: {1: 3}}", *SHORT, "epochs=3"]
    found = run("figure4", Results(tmp_path / "out", SCALES["tiny"], settings=[*settings, "batch=4"]))
    rows = {row["strategy"]: (row["first_batch"], row["last_batch"], row["growth_epoch"]) for row in found.table.rows}
    assert rows == {
        "sgd": (4, 4, None),
        "local": (4, 4, None),
        "local, prose": (4, 4, None),
        "local, growing batch": (4, 8, 3),
    }
    assert sum("batch" in file.name for file in found.files) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_table_and_figure_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    for name in plan_names():
        assert main(["reproduce", name, "--scale", "tiny", "--out", str(out), "--device", "cpu", "--quiet"]) == 0
        value = json.loads((out / f"{name}-tiny.json").read_text())
        assert {row["state"] for row in value["rows"]} <= {
            "",
            "never as good",
            "none within",
            "not in turn",
        }
        assert "not the paper's experiment" in (out / f"{name}-tiny.md").read_text()
    pictures = {path.name.removeprefix("figure") for path in out.glob("*.svg")}
    assert pictures >= {"3-tiny-boundary.svg", "4-tiny-memory.svg", "5-tiny-frontier-resnet50-imagenet.svg"}
    assert "table7-tiny-frontier-resnet18-cifar10.svg" in pictures


def test_a_run_that_was_broken_off_goes_on_and_tables_share_it(tmp_path):
    results = Results(tmp_path / "out", SCALES["tiny"], settings=SHORT)
    stopped, resumed, other = Diary(most=3), Diary(), Diary()
    with pytest.raises(KeyboardInterrupt):
        run("table2", results, stopped, cells=TWO)
    run("table2", results, resumed, cells=TWO)
    epochs = [(folder.partition("-")[0], epoch) for folder, epoch in sorted(stopped.epochs + resumed.epochs)]
    assert epochs == [("local", 0), ("local", 1), ("sgd", 0), ("sgd", 1)]
    run("table5", results, other, cells="vgg13-cifar10")
    assert [folder[:18] for folder, _ in other.epochs] == ["local-unsupervised"] * 2
    assert any("1 of 2 runs are finished already" in note for note in other.notes)


def test_runs_of_other_code_are_named(tmp_path):
    """A finished run that is shown again, and one that goes on."""
    results = Results(tmp_path / "out", SCALES["tiny"], settings=SHORT)
    with pytest.raises(KeyboardInterrupt):
        run("table2", results, Diary(most=3), cells=TWO)
    for path in results.group("vgg13-cifar10").glob("*/environment.json"):
        environment = json.loads(path.read_text())
        assert environment["code"] == code_digest()
        path.write_text(json.dumps({**environment, "code": "0123456789ab"}))
    again = Diary()
    found = run("table2", results, again, cells=TWO)
    named = [note for note in again.notes if note.startswith("made by other code")]
    assert len(named) == 2
    assert all(code_digest() in note and "(0123456789ab)" in note for note in named)
    both = f"0123456789ab+{code_digest()}"
    codes = {run.code for run in map(read_run, results.group("vgg13-cifar10").glob("*-seed0"))}
    assert codes == {"0123456789ab", both}
    assert both in next(note for note in found.table.notes if "different code" in note)
    value = json.loads((tmp_path / "out" / f"{results.name('table2')}.json").read_text())
    assert {entry["code"] for entry in value["runs"].values()} == codes


def test_runs_of_one_network_and_seed_take_turns(tmp_path):
    diary = Diary()
    found = run("table2", Results(tmp_path / "out", SCALES["tiny"], settings=SHORT), diary, seeds=2, cells=TWO)
    methods = [(folder.partition("-")[0], folder[-1], epoch) for folder, epoch in diary.epochs]
    assert methods == [
        *(("sgd", "0", 0), ("local", "0", 0), ("local", "0", 1), ("sgd", "0", 1)),
        *(("sgd", "1", 0), ("local", "1", 0), ("local", "1", 1), ("sgd", "1", 1)),
    ]
    row = next(row for row in found.table.rows if row["cell"] == "vgg13-cifar10/local")
    assert row["seeds"] == 2
    assert row["speedup_std"] is not None
    assert "a to b: the lower and the higher of two seeds." in found.table.notes


def test_a_dry_run_lists_what_is_left_and_writes_nothing(tmp_path, capsys):
    results = Results(tmp_path / "out", SCALES["tiny"], settings=SHORT)
    plan, entries = dry_run("table2", results, seeds=2, cells=TWO, device=CPU)
    assert [(entry.cell, entry.seed, entry.state) for entry in entries] == [
        (f"vgg13-cifar10/{method}", seed, "2 epochs") for method in ("sgd", "local") for seed in (0, 1)
    ]
    assert all(entry.seconds > 0 for entry in entries)
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt):
        run("table2", results, Diary(most=2), cells=TWO)
    _, entries = dry_run("table2", results, seeds=1, cells=TWO, device=CPU)
    assert [entry.state for entry in entries] == ["1 of 2 epochs done", "1 of 2 epochs done"]
    out = str(tmp_path / "empty")
    assert main(["reproduce", "table3", "--scale", "tiny", "--dry-run", "--device", "cpu", "--out", out]) == 0
    text = capsys.readouterr().out
    assert re.search(r"resnet50-imagenet/sgd-batch-\d+ +seed 0 +4 epochs, at most [\d.]+ s", text)
    assert "3 runs, at most" in text
    assert plan == make_plan("table2", results.base)


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


def test_a_strange_results_folder_is_refused(tmp_path, capsys):
    arguments = ["table2", "--scale", "tiny", "--out", str(tmp_path), "--device", "cpu"]
    (tmp_path / "letter.txt").write_text("dear")
    assert "is not a results folder of lowcal reproduce (it holds 'letter.txt')" in refusal(capsys, *arguments)
    (tmp_path / "reproduce.json").write_text('{"format": 1, "lowcal": "0.0.0"}')
    assert "holds results of lowcal 0.0.0, this is" in refusal(capsys, *arguments)
    assert "--dry-run" not in refusal(capsys, *arguments, "--dry-run")


def test_damaged_data_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "data" / "cifar-10-batches-py"
    files.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (files / name).write_text("damaged")
    arguments = ["table2", "--scale", "tiny", "--cells", "vgg13-cifar10/sgd", "--device", "cpu"]
    line = refusal(capsys, *arguments, "--data-dir", "data", "--out", "out")
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
    sizes = [
        "--set",
        "data.train_images=8",
        "--set",
        "data.test_images=4",
        "--set",
        "batch=2",
        "--set",
        "data.workers=0",
    ]
    arguments = [table, "--cells", "resnet34-imagenet/local*", "--device", "cpu", "--data-dir", "data", "--out", "out"]
    line = refusal(capsys, *arguments, *sizes)
    assert "'data' holds 2 class folders, but data 'imagenet' has 1000: give another --data-dir" in line
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_recipe_is_refused(tmp_path):
    results = Results(tmp_path / "out", SCALES["tiny"], settings=SHORT)
    run("table2", results, cells="vgg13-cifar10/sgd")
    recipe = next((tmp_path / "out").glob("*/sgd-*/recipe.yaml"))
    recipe.write_text(recipe.read_text().replace("lr: 0.05", "lr: 0.07"))
    with pytest.raises(LowcalError, match=r"another recipe: optimizer\.lr \(0\.07 there, 0\.05 here\)"):
        run("table2", results, cells=TWO)


def test_data_is_found_under_its_name_or_as_the_whole_folder(tmp_path):
    whole, several = tmp_path / "whole", tmp_path / "several"
    whole.mkdir()
    (several / "cifar10").mkdir(parents=True)
    full, tiny = SCALES["full"], SCALES["tiny"]
    assert Results(tmp_path, full, data_dir=whole).images("resnet50-imagenet") == whole
    assert Results(tmp_path, full, data_dir=several).images("vgg13-cifar10") == several / "cifar10"
    assert Results(tmp_path, full).images("vgg13-cifar10") is None
    with pytest.raises(LowcalError, match="has no folder 'cifar100'"):
        Results(tmp_path, full, data_dir=several).images("vgg13-cifar100")
    with pytest.raises(LowcalError, match="needs ImageNet"):
        Results(tmp_path, full, data_dir=several).images("resnet50-imagenet")
    results = Results(tmp_path, tiny, data_dir=several)
    assert (results.is_synthetic("vgg13-cifar10"), results.is_synthetic("resnet50-imagenet")) == (False, True)
    assert results.base("vgg13-cifar10").data.name == "cifar10"
    sizes = Results(tmp_path, tiny, data_dir=whole).base("vgg13-cifar100").data
    assert (sizes.train_images, sizes.test_images) == (500, 100)  # of which a fifth can be held out
