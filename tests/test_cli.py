"""The command as a person meets it: what it prints and writes."""

import json
import re

import pytest
import torch

from lowcal.cli import main
from lowcal.models import build_model

from .commands import IMAGES, folders, lines, small

pytestmark = pytest.mark.usefixtures("undrawn")


def test_compare_prints_one_table_and_writes_runs_and_report(here, capsys):
    assert main(["compare", *small(), "--methods", "sgd,local", "--seeds", "2", "--out", "out"]) == 0
    text = capsys.readouterr().out
    first, *others = text.splitlines()
    assert first == (
        "ResNet8 of width 4 on synthetic images (4 classes, 8x8), 2 epochs, 64 images: sgd, local, 2 seeds each; in out"
    )
    assert max(map(len, others)) <= 100
    table = text[text.index("method") :].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert [line.split()[0] for line in table[2:4]] == ["sgd", "local"]
    assert table[3].endswith("3/10")
    assert "out/report.html" in text
    assert {entry.name for entry in (here / "out").iterdir()} == {
        *(f"{method}-seed{seed}" for method in ("sgd", "local") for seed in (0, 1)),
        *("summary.json", "summary.csv", "summary.md", "report.html"),
    }
    rows = json.loads((here / "out" / "summary.json").read_text())["rows"]
    fields = "method seeds epochs top1_error top1_error_std seconds speedup flops_ratio peak_memory_bytes boundary"
    assert set(fields.split()) <= set(rows[0])
    assert [row["seeds"] for row in rows] == [2, 2]
    # An arm in a comparison trains as it does alone.
    assert main(["train", "--method", "local", *small("seed=1"), "--out", "alone"]) == 0
    assert lines(here / "alone") == lines(here / "out" / "local-seed1")


def test_a_growing_batch_is_told_and_reported(here, capsys):
    settings = ["epochs=3", "batch.grow=true", "batch.memory_limit=1GiB"]
    assert main(["compare", "--methods", "sgd,local", *small(*settings), "--out", "out"]) == 0
    assert "local-seed0: batch 32 from epoch 3 on" in capsys.readouterr().out.splitlines()
    assert [record["batch"] for record in lines(here / "out" / "local-seed0")] == [16, 16, 32]
    assert [record["batch"] for record in lines(here / "out" / "sgd-seed0")] == [16, 16, 16]
    assert "Batch: local-seed0 16, from epoch 3 on 32." in (here / "out" / "summary.md").read_text()


def test_output_that_is_no_terminal_holds_no_control_characters(here, capsys):
    assert main(["train", *small(), "--out", "out"]) == 0
    captured = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", captured.out)
    assert captured.err == ""
    assert len(re.findall(r"^local-seed0  [12]/2  loss \d", captured.out, re.M)) == 2


def test_quiet_prints_the_results_alone(here, capsys):
    assert main(["train", *small("precision=bf16"), "--out", "out", "--quiet"]) == 0
    result, place = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"local: top-1 error \d+\.\d\d %, training .*, boundary 3/10", result)
    assert place == "run: out"


def test_without_out_each_run_gets_a_folder_of_its_own(here, capsys):
    for _ in range(2):
        assert main(["train", "--method", "sgd", *small("epochs=1"), "--quiet"]) == 0
    assert sorted(entry.name for entry in (here / "runs").iterdir()) == ["digits-sgd", "digits-sgd-2"]


def test_a_finished_comparison_is_reported_again_and_can_grow(here, capsys):
    assert main(["compare", *small("epochs=1"), "--methods", "sgd", "--out", "out", "--quiet"]) == 0
    before = (here / "out" / "sgd-seed0" / "epochs.jsonl").read_bytes()
    assert main(["compare", *small("epochs=1"), "--methods", "sgd,freeze", "--out", "out"]) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert (here / "out" / "sgd-seed0" / "epochs.jsonl").read_bytes() == before


def test_layers_lists_the_network_in_execution_order(capsys):
    options = ["layers", "--model", "resnet8", "--channels", "1", "--image-size", "8", "--epochs", "30"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ 2  stages\.0\.0\.conv1 .* Conv2d  16x16x3x3 +2,304 +295 k +2$", text, re.M)
    assert "3 layers a move, 12 epochs between moves at least, 7 layers at most" in text
    assert main([*options, "--json"]) == 0
    network = json.loads(capsys.readouterr().out)
    assert (network["shift"], network["interval"], network["most_local"]) == (3, 12, 7)
    assert network["layers"][1]["flops"] == 2 * 8 * 8 * 16 * 16 * 9
    assert network["layers"][-1]["followers"] == []


def test_layers_flops_are_those_of_torchs_counter(capsys):
    from torch.utils.flop_counter import FlopCounterMode

    from lowcal.models import build_model

    assert main(["layers", "--model", "mobilenet_v2", "--classes", "7", "--json"]) == 0
    network = json.loads(capsys.readouterr().out)
    model = build_model("mobilenet_v2", classes=7).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(layer["flops"] for layer in network["layers"]) == counter.get_total_flops()


def test_report_joins_runs(here, capsys):
    for method, epochs in (("sgd", 2), ("local", 1)):
        assert main(["train", "--method", method, *small(f"epochs={epochs}"), "--out", method, "--quiet"]) == 0
    assert main(["report", "sgd", "local", "--out", "both"]) == 0
    shown = capsys.readouterr().out
    assert "both/report.html" in shown
    assert "Trained for different epochs: sgd 2, local 1." in shown.splitlines()
    assert (here / "both" / "report.html").is_file()


def test_titles_say_what_ran_and_not_what_the_recipe_is_called(here, capsys):
    folders(here / "pets", {"cat": 4, "dog": 4})
    options = [*IMAGES, "--set", "model.width=8", "--set", "batch=4", "--data-dir", "pets", "--out", "out"]
    assert main(["compare", "--recipe", "resnet18-cifar10", "--methods", "sgd,local", *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    told = "ResNet18 of width 8 on the image folder 'pets' (2 classes, 8x8), 1 epoch, 8 images"
    assert output.count(told) == 1  # the first line comes before the images are counted
    assert "recipe: resnet18-cifar10 with epochs=1, batch=4, model.width=8, data.name=image-folder" in output
    written = [(here / "out" / name).read_text() for name in ("summary.json", "summary.md", "report.html")]
    for text in (output, *written):
        assert "CIFAR-10" not in text
        assert "published" not in text
    assert json.loads(written[0])["title"] == told
    assert told in written[1]
    assert f"<title>{told}</title>".replace("'", "&#39;") in written[2]
    assert "The boundary of local never moved" in output


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["compare", "--help"], ["--version"]])
def test_help_and_version(arguments, capsys):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "lowcal" in captured.out
    assert captured.err == ""


def test_no_line_of_the_help_is_cut_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out.partition("Commands:")[2]
    assert "bench" in commands
    assert "..." not in commands


def test_a_network_with_given_weights_is_compared_with_its_rival_by_default(here, capsys):
    torch.save(build_model("resnet8", classes=4, width=4).state_dict(), here / "weights.pt")
    settings = small("model.weights=weights.pt", "model.frozen=6", "epochs=1")
    assert main(["compare", *settings, "--out", "out", "--quiet"]) == 0
    rows = json.loads((here / "out" / "summary.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["sgd", "freeze", "sgd-compressed-1"]
