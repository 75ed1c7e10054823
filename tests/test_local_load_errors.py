"""States that do not belong: load_state_dict refuses them in one line and changes nothing."""

import functools
import math

import pytest
import torch
from torch import nn

import lowcal
from lowcal import LoCal

from .networks import Residual, convnet, images, mlp, vectors
from .support import refused, sgd, train_epoch, train_step

INPUTS = vectors(1)[0][0]


def make(model, optimizer, **options):
    return LoCal(model, optimizer, **{"epochs": 9, "example_inputs": INPUTS, **options})


@functools.cache
def good_state():
    return trained()[2].state_dict()


def trained(boundary=2):
    model = mlp()
    optimizer = sgd(model)
    local = make(model, optimizer, schedule=lowcal.Fixed({2: boundary}))
    for seed in range(3):
        train_epoch(model, optimizer, local, vectors(2, seed=seed))
    return model, optimizer, local


DAMAGE = {
    "no dict": lambda state: None,
    "empty": lambda state: {},
    "another format": lambda state: {**state, "format": 99},
    "boundary beyond": lambda state: {**state, "boundary": 4},
    "boundary negative": lambda state: {**state, "boundary": -1},
    "boundary no number": lambda state: {**state, "boundary": "2"},
    "sign": lambda state: {**state, "sign": 3},
    "epoch": lambda state: {**state, "epoch": -1},
    "losses": lambda state: {**state, "losses": ["low"]},
    "losses not finite": lambda state: {**state, "losses": [math.nan]},
    "losses too few": lambda state: {**state, "losses": state["losses"][:1]},
    "changes": lambda state: {**state, "changes": None},
    "history": lambda state: {**state, "history": [[1, 2, 3]]},
    "history of no numbers": lambda state: {**state, "history": [["2", 2]]},
    "layers twice": lambda state: {**state, "layers": state["layers"][:3] + state["layers"][:1]},
    "layers no names": lambda state: {**state, "layers": [1, 2, 3, 4]},
    "start of another shape": lambda state: {**state, "start": torch.zeros(2, 2)},
    "start no tensor": lambda state: {**state, "start": [1.0]},
    "followers": lambda state: {**state, "followers": {"nowhere": "one"}},
    **{f"no {key}": lambda state, key=key: {k: v for k, v in state.items() if k != key}
       for key in ("layers", "epoch", "boundary", "sign", "losses", "changes", "start", "steps", "history")},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "example"), [*((kind, True) for kind in DAMAGE), ("empty", False), ("losses", False)])
def test_a_damaged_state(kind, example):
    good = good_state()
    state = DAMAGE[kind](good)
    model = mlp()
    optimizer = sgd(model)
    train_step(model, optimizer, vectors(1)[0])
    local = make(model, optimizer, example_inputs=INPUTS if example else None)
    with refused("load_state_dict", model=model, optimizer=optimizer, local=local):
        local.load_state_dict(state)
    local.load_state_dict(good)
    assert local.boundary == 2


class Deeper(nn.Module):
    """Layers of the same names as `mlp`, and one more."""

    def __init__(self):
        super().__init__()
        for name, module in mlp().named_children():
            self.add_module(name, module)
        self.five = nn.Linear(3, 3)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize(
    ("network", "example"),
    # without example_inputs nothing tells that `Deeper` runs a layer more
    [
        (convnet, True),
        (convnet, False),
        (Residual, True),
        (Residual, False),
        (Deeper, True),
    ],
)
def test_a_state_of_another_network(network, example):
    state = good_state()
    model = network()
    optimizer = sgd(model)
    inputs = INPUTS if network is Deeper else images(1)[0][0]
    local = make(model, optimizer, example_inputs=inputs if example else None)
    with refused("load_state_dict", model=model, optimizer=optimizer, local=local):
        local.load_state_dict(state)


def test_a_state_behind_the_present_boundary():
    state = trained(boundary=1)[2].state_dict()
    model, optimizer, local = trained(boundary=3)
    with refused("1", "3", model=model, optimizer=optimizer, local=local):
        local.load_state_dict(state)


def test_a_state_that_the_schedule_cannot_serve():
    state = good_state()
    model = mlp()
    optimizer = sgd(model)
    local = make(model, optimizer, example_inputs=None, schedule=lowcal.Fixed({8: 7}))
    with refused("7", model=model, optimizer=optimizer, local=local):
        local.load_state_dict(state)
