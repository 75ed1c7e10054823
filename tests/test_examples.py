"""What documentation shows is run: each example script, and the example in each public docstring."""

import doctest
import importlib
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import nn

from .support import reached, same
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
@pytest.mark.parametrize("name", ["lightning_trainer", "accelerate_loop", "transformers_trainer"])
def test_hosts(name, capsys):
    host = name.partition("_")[0]
    pytest.importorskip(host, reason=f"{host} is not installed")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "boundary 2" in last
    assert float(last.split("accuracy ")[1].split("%")[0]) > 85


def example(name, capsys):
    """Runs an example; returns what it defines and the lines that it prints."""
    names = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return names, capsys.readouterr().out.splitlines()


def accuracy(line):
    return float(line.split("accuracy ")[1].split("%")[0])


def test_compiled(capsys):
    names, lines = example("compiled", capsys)
    assert [line.split(":")[0] for line in lines] == ["compiled before LoCal", "compiled after LoCal"]
    assert all("boundary 2 of 4" in line and accuracy(line) > 60 for line in lines)
    assert same(names["weights"]["before"], names["weights"]["after"])


def test_mixed_precision(capsys):
    names, lines = example("mixed_precision", capsys)
    assert all("boundary 2 of 4" in line and accuracy(line) > 85 for line in lines)
    without, scaler = names["scalers"]
    assert not without.is_enabled()
    assert scaler.get_scale() < 2.0**24  # at least one step overflowed, and was skipped


def test_ema(capsys):
    names, lines = example("ema", capsys)
    assert "boundary 2 of 4" in lines[-1]
    assert accuracy(lines[-1]) > 85
    model, averaged = names["model"], names["averaged"]
    averaged.train()(names["images"][:9]).sum().backward()
    optimizer, before = names["optimizer"], model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)  # passes of the copy make no local update
    distance = (averaged.module[0].weight - model[0].weight).norm()  # a local layer, which moves by 0.001 a step
    assert 0 < distance < 0.05


def test_checkpointing(capsys):
    names, lines = example("checkpointing", capsys)
    assert all(line.endswith("boundary 3") for line in lines)
    assert same(*names["weights"])


def test_several_optimizers(capsys):
    names, lines = example("several_optimizers", capsys)
    assert "boundary 2 of 4" in lines[-1]
    assert accuracy(lines[-1]) > 85
    model, muon, adamw = names["model"], names["muon"], names["adamw"]
    assert not model[1].weight.requires_grad
    assert not model[4].weight.requires_grad
    assert list(muon.state) == [model[7].weight]  # optimizers forget what is local
    assert model[1].weight not in adamw.state
    assert names["local"].state_dict()["epoch_counts"] == [0, 0, 0]
    assert names["local"].state_dict()["steps"] == 4 * 30  # one for both optimizers


def test_finetune(capsys):
    names, lines = example("finetune", capsys)
    assert "boundary 10 of 21" in lines[-1]
    assert accuracy(lines[-1]) > 40  # of five classes
    after = names["model"].state_dict()
    kept = {key for key, value in names["weights"].items() if same(value, after[key])}
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.")  # 1 + 4 + 5 layers
    assert {key for key in after if key.startswith(frozen)} == kept
    assert {key.split(".")[0] for key in after.keys() - kept} == {"layer3", "layer4", "fc"}


def test_unet(capsys):
    names, lines = example("unet", capsys)
    assert "boundary 3 of 6" in lines[-1]
    assert accuracy(lines[-1]) > 85
    model = names["model"].train()
    found = {name.split(".")[0] for name in reached(model, model(names["noisy"][:2]).sum())}
    assert found == {"join2", "up1", "join1", "head"}  # up2 runs before the fourth layer


def test_lstm(capsys):
    names, lines = example("lstm", capsys)
    assert "boundary 1 of 3" in lines[-1]
    assert accuracy(lines[-1]) > 80
    model = names["model"].train()
    assert {name.split(".")[0] for name in reached(model, model(names["rows"][:2]).sum())} == {"hidden", "head"}


def test_transformer(capsys):
    names, lines = example("transformer", capsys)
    assert "boundary 3 of 6" in lines[-1]
    assert accuracy(lines[-1]) > 80
    model = names["model"].train()
    found = reached(model, model(names["rows"][:2]).sum())
    assert {name.rpartition(".")[0] for name in found} == {"blocks.1.wide", "blocks.1.narrow", "head"}


def test_gan(capsys):
    names, lines = example("gan", capsys)
    assert lines[-1].endswith("boundaries 1 of 4, 1 of 3")
    generator, discriminator = names["generator"].train(), names["discriminator"].train()
    fake = generator(torch.randn(4, 16))
    assert reached(generator, fake.sum()) == {f"{layer}.{kind}" for layer in (2, 4, 6) for kind in ("weight", "bias")}
    assert reached(discriminator, discriminator(fake.detach()).sum()) == {
        f"{layer}.{kind}" for layer in (2, 4) for kind in ("weight", "bias")
    }
    both = reached(nn.Sequential(generator, discriminator), discriminator(fake).sum())
    assert both == {f"{key}.{kind}" for key in ("0.2", "0.4", "0.6", "1.2", "1.4") for kind in ("weight", "bias")}


def test_lora(capsys):
    pytest.importorskip("peft")
    names, lines = example("lora", capsys)
    assert "boundary 2 of 4" in lines[-1]
    assert accuracy(lines[-1]) > 70
    merged = names["merged"]
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(names["images"][1500:]), names["outputs"], rtol=1e-4, atol=1e-4)


def test_each_example_is_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
