"""`lowcal predict`: the classes of images by a trained run, as its evaluation sees them."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lowcal.cli import main
from lowcal.data.datasets import read_digits
from lowcal.data.images import Decoding, Task, fit_evaluated, read_rgb
from lowcal.data.policy import Policy

from .commands import IMAGES, folders, interrupted, lines, refused, small

pytestmark = pytest.mark.usefixtures("undrawn", "here")

DIGITS = ["--recipe", "digits", "--set", "epochs=2", "--set", "model.width=4", "--quiet"]


def predicted(arguments, capsys):
    capsys.readouterr()
    assert main(["predict", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def save_digits(folder):
    """The digits' test images as files; returns their labels."""
    test = read_digits().test
    folder.mkdir()
    for number, pixels in enumerate(test.pixels):
        Image.fromarray(pixels[0].numpy()).save(folder / f"{number:03}.png")
    return test.labels.tolist()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("local", ["local.schedule={name: fixed, epochs: {1: 3}}"]),
        ("sgd", ["data.channels=3", "data.image_size=16", "precision=bf16"]),
        ("freeze", ["ema=0.9"]),
        ("prune", ["prune.every=1", "prune.threshold=0.1"]),
    ],
)
def test_the_errors_on_the_test_images_are_those_of_the_run(here, capsys, method, settings):
    more = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", *DIGITS, "--method", method, *more, "--out", "run"]) == 0
    labels = save_digits(here / "images")
    result = predicted(["run", "images"], capsys)
    assert result["run"] == "run"
    assert [row["file"] for row in result["rows"]] == [f"images/{number:03}.png" for number in range(len(labels))]
    wrong = sum(row["label"] != label for row, label in zip(result["rows"], labels, strict=True))
    assert 100 * wrong / len(labels) == pytest.approx(lines(here / "run")[-1]["top1_error"])
    assert all(0 < row["probability"] <= 1 for row in result["rows"])


def test_classes_have_the_names_of_their_folders_and_files_of_other_sizes_are_fitted(here, capsys):
    folders(here / "pets", {"cat": 4, "dog": 4})
    options = [*IMAGES, "--set", "model.width=4", "--data-dir", "pets", "--method", "sgd", "--quiet"]
    assert main(["train", *options, "--out", "run"]) == 0
    Image.new("L", (30, 20), 90).save(here / "large.png")
    capsys.readouterr()
    assert main(["predict", "run", "large.png", "pets/test", "--csv", "table.csv"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["file", "class", "probability"]
    with (here / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows[:2]] == ["large.png", "pets/test/cat/0.png"]
    assert len(rows) == 9
    assert {row["class"] for row in rows} <= {"cat", "dog"}


def test_a_file_that_is_no_image_is_named_and_the_others_go_on(here, capsys):
    assert main(["train", *small("epochs=1"), "--method", "sgd", "--out", "run", "--quiet"]) == 0
    (here / "images").mkdir()
    (here / "images" / "b.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9), "red").save(here / "images" / "a.png")
    capsys.readouterr()
    assert main(["predict", "run", "images", "--json"]) == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [row["file"] for row in result["rows"]] == ["images/a.png"]
    assert result["unreadable"] == ["images/b.png: not an image"]
    assert captured.err == ("lowcal: 1 of 2 files cannot be read: images/b.png: not an image; fix or remove them\n")


def test_an_unfinished_run_predicts_with_its_last_checkpoint(here, monkeypatch, capsys):
    arguments = ["train", *small("epochs=3"), "--method", "sgd", "--out", "run", "--quiet"]
    assert interrupted(arguments, 1, monkeypatch) == 130
    Image.new("RGB", (8, 8), "red").save(here / "a.png")
    assert len(predicted(["run", "a.png"], capsys)["rows"]) == 1


def test_the_best_weights_are_those_of_their_file(here, capsys):
    assert main(["train", *DIGITS, "--method", "sgd", "--out", "run"]) == 0
    save_digits(here / "images")
    last = predicted(["run", "images"], capsys)
    (here / "run" / "model-best.safetensors").unlink()
    refused(["predict", "run", "images", "--weights", "best"], "model-best.safetensors does not exist", capsys)
    weights = load_file(here / "run" / "model.safetensors")
    weights["head.weight"] = weights["head.weight"].flip(0)  # the scores of the classes in reverse
    weights["head.bias"] = weights["head.bias"].flip(0)
    save_file(weights, here / "run" / "model-best.safetensors")
    best = predicted(["run", "images", "--weights", "best"], capsys)
    assert best["weights"] == "best"
    assert [row["label"] for row in best["rows"]] == [9 - row["label"] for row in last["rows"]]
    (here / "run" / "model-best.safetensors").write_bytes(b"damaged")
    refused(["predict", "run", "images", "--weights", "best"], "leave --weights best out", capsys)
    weights["head.weight"] = weights["head.weight"][:, 1:].contiguous()
    save_file(weights, here / "run" / "model-best.safetensors")
    refused(["predict", "run", "images", "--weights", "best"], "does not fit the network", capsys)


def test_mistakes(here, capsys):
    assert main(["train", *small("epochs=1"), "--method", "sgd", "--out", "run", "--quiet"]) == 0
    Image.new("RGB", (8, 8), "red").save(here / "a.png")
    (here / "empty").mkdir()
    capsys.readouterr()
    refused(["predict", "nothing", "a.png"], "nothing is not a folder", capsys)
    refused(["predict", "run", "b.png"], "b.png does not exist", capsys)
    refused(["predict", "run", "empty"], "empty holds no image file", capsys)
    refused(["predict", "run", "a.png", "--csv", "none/a.csv"], "in a folder that exists", capsys)


def test_imagenets_evaluation_is_that_of_its_loader(tmp_path):
    pytest.importorskip("torchvision")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (50, 300, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    own = Decoding(32, Policy())[[Task(str(tmp_path / "a.png"), 0, None)]].pixels
    fitted = np.array(fit_evaluated(read_rgb(str(tmp_path / "a.png")), 32))
    assert torch.equal(own[0], torch.from_numpy(fitted).permute(2, 0, 1))
