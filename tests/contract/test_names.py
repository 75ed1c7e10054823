"""What people's scripts rely on, held against the written list in names.yaml.

Names may be added to the list; one that is taken away breaks somebody's script.
"""

import inspect
import json
from pathlib import Path

import pytest
import yaml

import lowcal
from lowcal.cli import main
from lowcal.experiments.recipe_text import apply_settings, load_recipe
from lowcal.steps.modes import STEPS

NAMES = yaml.safe_load((Path(__file__).parent / "names.yaml").read_text())
SMALL = ["epochs=1", "batch=16", "model.width=4", "step=eager"]
IMAGES = "data={name: synthetic, train_images: 32, test_images: 16, image_size: 8, classes: 2}"


def keys(value, prefix=""):
    """The dotted names of a JSON value's fields; a list stands for its first element."""
    if isinstance(value, list):
        return keys(value[0], prefix) if value else set()
    if not isinstance(value, dict):
        return set()
    found = set()
    for name, inner in value.items():
        found |= {prefix + name} | keys(inner, f"{prefix}{name}.")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("names") / "out"
    settings = [f"--set={setting}" for setting in [*SMALL, IMAGES]]
    assert main(["compare", "--out", str(out), "--methods", "local", *settings, "-q"]) == 0
    return out


def test_public_names():
    assert sorted(lowcal.__all__) == NAMES["public"]


@pytest.mark.parametrize("name", sorted(NAMES["arguments"]))
def test_arguments_and_defaults(name):
    signature = inspect.signature(getattr(lowcal, name))
    found = {
        parameter.name: "required" if parameter.default is parameter.empty else repr(parameter.default)
        for parameter in signature.parameters.values()
    }
    expected = NAMES["arguments"][name]
    assert {argument: found.get(argument) for argument in expected} == expected


@pytest.mark.parametrize("key", NAMES["settings"])
def test_settings(key, tmp_path, capsys):
    main(["compare", "--out", str(tmp_path / "out"), "--methods", "none", "--set", f"{key}=[]"])
    assert "unknown setting" not in capsys.readouterr().err  # the answer to an unknown key


def test_kinds_of_step():
    recipe = load_recipe("digits")
    assert [apply_settings(recipe, [f"step={name}"]).step for name in NAMES["step"]] == NAMES["step"]
    assert set(NAMES["step"]) == {"auto", *STEPS}


@pytest.mark.parametrize("name", NAMES["recipes"])
def test_recipes(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", sorted(NAMES["commands"]))
def test_commands_and_options(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert [option for option in NAMES["commands"][name] if option not in shown] == []


def test_fields_of_a_run(folder):
    run = folder / "local-seed0"
    assert set(NAMES["run folder"]) <= {path.name for path in run.iterdir()}
    record = json.loads((run / "epochs.jsonl").read_text().splitlines()[0])
    assert set(NAMES["epochs.jsonl"]) <= set(record)
    assert set(NAMES["summary.json of a run"]) <= set(json.loads((run / "summary.json").read_text()))


def test_fields_of_a_comparison(folder):
    assert {"summary.json", "summary.csv", "summary.md", "report.html"} <= {path.name for path in folder.iterdir()}
    assert set(NAMES["summary.json"]) <= keys(json.loads((folder / "summary.json").read_text()))


def test_fields_of_a_bench(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = (
        "--model resnet8 --width 4 --batch 2 --image-size 8 --rounds 1 --epochs 4 --boundaries 0,0.5 --every 1 -q"
    )
    assert main(["bench", *arguments.split(), "--json", str(file)]) == 0
    assert set(NAMES["bench --json"]) <= keys(json.loads(file.read_text()))


def test_exit_codes(tmp_path, capsys):
    assert main(["compare", "--recipe", "nonsense", "--out", str(tmp_path / "out")]) == NAMES["exit codes"]["mistake"]
    assert main(["--version"]) == NAMES["exit codes"]["success"]
