"""Mistakes in the command line: one line that names the mistake and the remedy, and nothing written."""

from pathlib import Path

import pytest

from lowcal.cli import main

from .commands import IMAGES, broken, folders, interrupted, refused, small

pytestmark = pytest.mark.usefixtures("undrawn")

WRONG = {
    "no such command": (["compar"], "'compare'"),
    "no such option": (["compare", "--recipee", "digits"], "'--recipe'"),
    "option of other programs": (["compare", "--epochs", "3"], "no option '--epochs'; use --set epochs=3"),
    "the same with =": (["train", "--epochs=3"], "no option '--epochs'; use --set epochs=3"),
    "rate": (["train", "--lr", "0.1", "--quiet"], "no option '--lr'; use --set optimizer.lr=0.1"),
    "option without its value": (["train", "--seed", "--quiet"], "no option '--seed'; use --set seed=VALUE"),
    "value for a shell": (["train", "--precision", "a b"], "use --set 'precision=a b'"),
    "option of a section": (["train", "--decay-every", "3"], "no option '--decay-every'; use --set local"),
    "command without settings": (["layers", "--lr", "1"], "no option '--lr'; "),
    "seeds 0": (["compare", "--seeds", "0"], "'--seeds'"),
    "recipe": (["compare", "--recipe", "digit"], "did you mean 'digits'"),
    "method": (["compare", "--methods", "sgd,lokal"], "did you mean 'local'"),
    "methods combined": (["compare", "--methods", "sgd,local+prune"], "methods cannot be combined yet; choose one"),
    "method that does not apply": (
        ["train", "--method", "stochastic-depth", "--set", "model.name=vgg13", "--set", "data.name=synthetic"],
        "stochastic-depth drops residual blocks, and VGG has none that it knows",
    ),
    "step without a GPU": (
        ["train", "--device", "cpu", "--set", "step=graphed"],
        "the step 'graphed' needs a CUDA device, and this network is on cpu; use 'eager' or 'compiled'",
    ),
    "step that does not fit the method": (
        ["train", "--method", "sgd", "--device", "cpu", "--set", "step=compile"],
        "step=compile: must be 'auto', 'eager', 'compiled', 'graphed', 'graphed-compiled' or 'graphed-overlapped'",
    ),
    "method of train": (["train", "--method", "freese"], "did you mean 'freeze'"),
    "method twice": (["compare", "--methods", "sgd,sgd"], "twice"),
    "model": (["compare", "--set", "model.name=resnet9"], "did you mean"),
    "model and channels": (["compare", "--set", "model.name=mobilenet_v2"], "3 channels"),
    "model and width": (["layers", "--model", "alexnet", "--width", "8"], "width"),
    "key": (["compare", "--set", "schedule.alpha=1"], "did you mean 'local.schedule.alpha'"),
    "epochs": (["compare", "--set", "epochs=0"], "epochs=0"),
    "too many layers": (["compare", *small("local.schedule.epochs={1: 10}")], "10 layers at epoch 1"),
    "data folder": (["compare", *IMAGES, "--data-dir", "none"], "none"),
    "no data folder": (["compare", *IMAGES], "--data-dir"),
    "no image": (["compare", *IMAGES, "--data-dir", "text"], "2.png"),
    "device": (["compare", "--device", "gpu"], "unknown device 'gpu'"),
    "absent device": (["compare", "--device", "cuda:99"], "--device cpu"),
    "resume without folder": (["train", "--resume"], "--out"),
    "report of nothing": (["report", "none", "--out", "out"], "none"),
    "report without folder": (["report", "empty"], "--out"),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=list(WRONG))
def test_a_mistake_ends_in_one_line_that_names_it_and_writes_nothing(here, arguments, expected, capsys):
    if "--data-dir" in arguments:
        broken(here / "text")
    elif "empty" in arguments:
        (here / "empty").mkdir()
    before = sorted(path for path in here.rglob("*") if "cache" not in path.parts)
    refused(arguments, expected, capsys)
    assert sorted(path for path in here.rglob("*") if "cache" not in path.parts) == before


def test_unusable_images_are_skipped_and_counted_by_a_setting(here, capsys):
    broken(here / "data")
    arguments = [*IMAGES, "--set", "data.on_error=skip", "--data-dir", "data", "--out", "out"]
    assert main(["train", "--method", "sgd", "--set", "model.width=4", *arguments]) == 0
    output = capsys.readouterr().out
    assert "skipped 1" in output
    assert "2.png" in output


@pytest.mark.parametrize("command", ["compare", "train"])
@pytest.mark.parametrize("kind", ["file", "strangers", "below a file"])
def test_a_folder_that_is_not_ours_is_refused_before_any_work(here, command, kind, capsys, monkeypatch):
    monkeypatch.setattr("lowcal.experiments.assemble.load", None)
    out = here / "out"
    if kind == "strangers":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine")
    place = out / "deep" / "deeper" if kind == "below a file" else out
    refused([command, *small(), "--out", str(place)], "choose another --out", capsys)
    left = [path.name for path in here.rglob("*") if not path.is_relative_to(here / "cache")]  # matplotlib's fonts
    assert left == (["out", "thesis.tex"] if kind == "strangers" else ["out"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused(capsys):
    refused(["compare", *small(), "--out", "/proc/lowcal"], "cannot write to /proc/lowcal", capsys)


def test_runs_of_another_recipe_are_not_mixed(here, capsys):
    assert main(["compare", *small(), "--methods", "sgd", "--out", "out", "--quiet"]) == 0
    capsys.readouterr()
    refused(["compare", *small("epochs=3"), "--out", "out"], "epochs (2 there, 3 here)", capsys)
    refused(["train", *small(), "--out", "out"], "is not a run", capsys)
    refused(["compare", *small(), "--out", "out/sgd-seed0"], "is a single run", capsys)
    refused(["train", *small(), "--out", "out/sgd-seed0"], "holds a run already", capsys)
    resume = ["train", "--resume", "--out", "out/sgd-seed0"]
    refused([*resume, "--set", "local.lr=0.5"], "local.lr (", capsys)
    refused([*resume, "--recipe", "resnet18-cifar10"], "another recipe", capsys)
    refused([*resume, "--method", "freeze"], "is a run of 'sgd', not of 'freeze'", capsys)
    assert main(resume) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_run_is_not_resumed_on_images_of_other_classes(here, monkeypatch, capsys):
    folders(here / "pets", {"cat": 4, "dog": 4})
    folders(here / "more", {"cat": 4, "cow": 4, "dog": 4})
    options = [*IMAGES, "--set", "model.width=8", "--set", "epochs=3", "--method", "sgd", "--out", "out"]
    assert interrupted(["train", *options, "--data-dir", "pets"], 1, monkeypatch) == 130
    capsys.readouterr()
    refused(["train", "--resume", "--out", "out", "--data-dir", "more"], "started on images of 2 classes", capsys)
    assert main(["train", "--resume", "--out", "out", "--data-dir", "pets", "--quiet"]) == 0


def test_a_diverging_run_stops_and_says_where(here, capsys):
    refused(["train", "--method", "sgd", *small("optimizer.lr=1e30"), "--out", "out"], "step", capsys)
