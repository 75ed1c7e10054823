"""What documentation shows is run: each example script, and the example in each public docstring."""

import doctest
import importlib
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from .world import apart

ROOT = Path(__file__).parents[1]
MODULES = ["cache", "errors", "layers", "local", "rules", "schedule", "supervision", "pending", "steps.make"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"lowcal.{name}")
    names = {"torch": importlib.import_module("torch"), "nn": importlib.import_module("torch.nn")}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_plain_loop(capsys):
    runpy.run_path(str(ROOT / "examples" / "plain_loop.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "boundary 2 of 4" in last
    assert float(last.split("accuracy ")[1].split("%")[0]) > 85


def run_ddp(out):
    with out.open("a") as file, redirect_stdout(file):
        runpy.run_path(str(ROOT / "examples" / "ddp.py"), run_name="__main__")


def test_ddp(tmp_path):
    """In two processes with the environment that torchrun sets."""
    out = tmp_path / "out.txt"
    assert apart(2, run_ddp, out) == [0, 0]
    lines = out.read_text().splitlines()
    assert len(lines) == 6  # of rank 0 alone
    assert "boundary 2 of 4" in lines[-1]
    assert float(lines[-1].split("accuracy ")[1].split("%")[0]) > 85
    sent = [int(line.split(", ")[1].split(" ")[0]) for line in lines]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] > sent[-1]


@pytest.mark.filterwarnings("ignore")  # the host's own advice
def test_lightning_trainer(capsys):
    pytest.importorskip("lightning", reason="Lightning is not installed")
    runpy.run_path(str(ROOT / "examples" / "lightning_trainer.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("boundary 2")
    assert float(last.split("accuracy ")[1].split("%")[0]) > 85


@pytest.mark.filterwarnings("ignore")  # the host's own advice
def test_accelerate_loop(capsys):
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    runpy.run_path(str(ROOT / "examples" / "accelerate_loop.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "boundary 2 of 4" in last
    assert float(last.split("accuracy ")[1].split("%")[0]) > 85
