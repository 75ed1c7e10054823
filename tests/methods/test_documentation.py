"""The examples of docs/extending.md do what it says."""

import re
from pathlib import Path

import pytest
import torch

from lowcal import LoCal, LowcalError
from lowcal.methods import METHODS

from ..contract import test_methods as contract
from ..networks import convnet, images
from ..support import sgd, train_epoch, train_step, weights

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def examples():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[1:]  # the first is an excerpt
    names = {"__name__": "lowcal.examples"}
    for block in blocks:
        exec(block, names)
    return names


def test_the_example_of_a_method_is_short_and_does_what_it_says(examples):
    section = TEXT.partition("## A method")[2].partition("## A rule")[0]
    assert len(section.splitlines()) < 60
    model = convnet()
    settings = examples["L1Settings"](strength=0.5)
    method = examples["L1"](model, sgd(model), settings, epochs=1, example_inputs=images(1)[0][0])
    expected = 0.5 * sum(model.get_parameter(f"{layer}.weight").abs().sum() for layer in method.layers)
    torch.testing.assert_close(method.penalty(torch.tensor(1.0)), expected)
    with pytest.raises(LowcalError, match="L1Settings: strength is 0; give a number, above 0"):
        examples["L1Settings"](strength=0)


def test_the_example_of_a_method_keeps_the_contract(examples, monkeypatch):
    monkeypatch.setitem(METHODS, "l1", examples["L1"])
    monkeypatch.setitem(contract.OTHER_SETTINGS, "l1", examples["L1Settings"]())
    contract.test_it_is_registered_under_its_name("l1")
    contract.test_its_state_goes_on_bitwise_from_any_epoch("l1")
    contract.test_its_penalty_can_be_added_to_a_loss("l1")
    contract.test_its_twin_does_the_same_and_leaves_it_alone("l1", 2)


def test_the_example_of_a_rule(examples):
    model = convnet()
    optimizer = sgd(model)
    local = LoCal(model, optimizer, epochs=2, rule=examples["Decay"](lr=0.25), example_inputs=images(1)[0][0])
    local.move_to(1)
    before = weights(model)["conv1.weight"].clone()
    train_step(model, optimizer, images(1)[0])
    torch.testing.assert_close(model.conv1.weight.detach(), before * (1 - 0.25 / before.norm()))


def test_the_example_of_a_schedule(examples):
    steady = examples["Steady"](wait=2)
    model = convnet()
    optimizer = sgd(model)
    local = LoCal(model, optimizer, epochs=5, schedule=steady, example_inputs=images(1)[0][0])
    boundaries = []
    for epoch in range(5):
        train_epoch(model, optimizer, local, images(1, seed=epoch))
        boundaries.append(local.boundary)
    assert boundaries == [0, 1, 1, 2, 2]
