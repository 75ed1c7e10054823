"""What documentation shows is run: each example script, and the example in each public docstring."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ["errors", "layers", "local", "rules", "schedule", "supervision", "pending"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"lowcal.{name}")
    names = {"torch": importlib.import_module("torch"), "nn": importlib.import_module("torch.nn")}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_plain_loop():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "plain_loop.py"], capture_output=True, text=True, check=True, timeout=120
    )
    last = done.stdout.splitlines()[-1]
    assert "boundary 2 of 4" in last
    assert float(last.split("accuracy ")[1].split("%")[0]) > 85


def test_ddp():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, ROOT / "examples" / "ddp.py"], capture_output=True, text=True, check=True, timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.10
    assert len(lines) == 6  # of rank 0 alone
    assert "boundary 2 of 4" in lines[-1]
    assert float(lines[-1].split("accuracy ")[1].split("%")[0]) > 85
    sent = [int(line.split(", ")[1].split(" ")[0]) for line in lines]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] > sent[-1]
