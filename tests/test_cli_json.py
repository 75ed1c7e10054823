"""`--json`, examples and completion, on every command that has them."""

import json
import subprocess
import sys

import pytest

from lowcal.cli import main
from lowcal.commands import complete
from lowcal.methods import METHODS
from lowcal.models import MODELS, model_names

from .commands import small

pytestmark = pytest.mark.usefixtures("undrawn")

COMMANDS = ["compare", "train", "predict", "report", "layers", "bench", "sweep", "reproduce", "list", "doctor", "cache"]


def document(arguments, capsys):
    """The JSON on standard output; what is on standard error."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_compare_train_and_report_print_one_document(here, capsys):
    result, notes = document(["compare", *small(), "--methods", "sgd,local", "--out", "out"], capsys)
    assert [row["method"] for row in result["rows"]] == ["sgd", "local"]
    assert result["report"] == "out/report.html"
    assert "local-seed0  2/2  loss" in notes
    again, _ = document(["report", "out", "--out", "both"], capsys)
    assert again["rows"] == result["rows"]
    run, notes = document(["train", *small(), "--method", "local", "--out", "alone"], capsys)
    assert run["folder"] == "alone"
    assert run["top1_error"] == next(row["top1_error"] for row in result["rows"] if row["method"] == "local")
    assert "1/2" in notes
    assert document(["train", *small(), "--method", "local", "--out", "quiet", "--quiet"], capsys)[1] == ""


def test_sweep_and_reproduce_print_one_document(here, capsys):
    pytest.importorskip("optuna")
    search = ["--search", "optimizer.lr=0.1,0.01", "--sampler", "grid", "--method", "sgd"]
    result, notes = document(["sweep", *small("epochs=1"), *search, "--out", "out"], capsys)
    assert len(result["rows"]) == 2
    assert "2 of 2 trials finished" in notes
    plan, _ = document(["reproduce", "table1", "--scale", "tiny", "--dry-run"], capsys)
    assert plan["runs"][0]["cell"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_an_example_with_known_options(command, capsys):
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    example = text.partition("Example: ")[2].split(" Options:")[0].split(" Arguments:")[0].split()
    assert example[:2] == ["lowcal", command]
    assert all(word in text.partition("Options:")[2] for word in example if word.startswith("--"))


def completed(words):
    code = "import sys; from lowcal.cli import main; code = main([]); print(code, 'torch' in sys.modules)"
    environment = {"_LOWCAL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = subprocess.run([sys.executable, "-c", code], env=environment | _path(), capture_output=True, text=True)
    *found, last = result.stdout.split("\n")[:-1]
    assert last == "0 False", result.stderr
    return found


def _path():
    import os

    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}


def test_the_shell_completes_names_without_loading_torch():
    assert completed("lowcal compare --recipe resnet3") == ["resnet34-imagenet"]
    assert completed("lowcal sw") == ["sweep"]


def test_what_is_completed_is_what_there_is():
    assert set(complete.OWN_MODELS) == set(MODELS)
    assert complete.models("") == model_names()
    assert complete.methods("sgd,lo") == ["sgd,local"]
    assert set(complete.methods("")) == set(METHODS)
    assert complete.recipes("digi") == ["digits"]


def test_the_completion_script_can_be_shown(capsys):
    assert main(["--show-completion", "bash"]) == 0
    assert "_lowcal_completion()" in capsys.readouterr().out
