"""The commands that answer questions: list, doctor."""

import json
from pathlib import Path

import pytest
import yaml

import lowcal
from lowcal.cli import main
from lowcal.experiments.recipe_text import apply_settings, load_recipe

NAMES = yaml.safe_load((Path(__file__).parent / "contract" / "names.yaml").read_text())


def listed(what, capsys):
    assert main(["list", what, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_setting_is_listed_and_its_default_can_be_set(capsys):
    rows = listed("settings", capsys)
    assert {row["setting"] for row in rows} == set(NAMES["settings"])
    for row in rows:
        if row["default"] != "required" and not row["setting"].startswith("local.schedule"):
            apply_settings(load_recipe("digits"), [f"{row['setting']}={row['default']}"])


def test_recipes_methods_and_models_are_listed(capsys):
    assert [row["recipe"] for row in listed("recipes", capsys)] == sorted(NAMES["recipes"])
    methods = [row["method"] for row in listed("methods", capsys)]
    assert {"sgd", "local", "freeze", "refresh", "stochastic-depth", "prune", "sgd-compressed"} == set(methods)
    assert {"resnet18", "mobilenet_v2", "timm/NAME"} <= {row["model"] for row in listed("models", capsys)}


@pytest.mark.parametrize("what", ["settings", "recipes", "methods", "models"])
def test_a_list_is_a_table(what, capsys):
    assert main(["list", what]) == 0
    heading, line, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == what.removesuffix("s")
    assert set(line) == {"-"}
    assert len(rows) > 5


def test_an_unknown_list_is_one_line(capsys):
    assert main(["list", "recipe"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_doctor_says_what_is_here_and_what_is_not(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lowcal"] == lowcal.__version__
    assert "eager" in facts["steps"]
    assert facts["packages"]["torchvision"]
    monkeypatch.setattr("lowcal.commands.info._EXTRAS", {"no-such-package": "sweep", "torchvision": "cli"})
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "pip install 'lowcal[sweep]'" in text
    assert "not installed   no-such-package" in text
