"""What holds for every rule, schedule and supervision, and for a tiny network trained under them."""

import copy
import dataclasses
import pickle

import pytest
import torch

import lowcal

from ..networks import convnet, images
from ..support import same, sgd, train_epoch, weights


def is_a_frozen_dataclass(value):
    assert dataclasses.is_dataclass(value)
    assert type(value).__dataclass_params__.frozen
    names = [field.name for field in dataclasses.fields(value)] or ["anything"]
    for name in names:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


def is_a_value(value):
    """Equal to its copies, usable as a key, and shown as the call that makes it."""
    names = {name: getattr(lowcal, name) for name in lowcal.__all__}
    for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value)), eval(repr(value), names)):
        assert twin == value
        assert hash(twin) == hash(value)
        assert repr(twin) == repr(value)
    assert {value: 1}[copy.copy(value)] == 1


def is_pure(value, *arguments):
    """The same answer to the same question, asked twice and of a copy; the value itself stays as it was."""
    before = pickle.dumps(value)
    answers = [value(*arguments), value(*arguments), copy.deepcopy(value)(*arguments)]
    assert answers[0] == answers[1] == answers[2]
    assert pickle.dumps(value) == before
    return answers[0]


def trains(epochs=6, **options):
    """Trains a tiny network under `options`, with checks on the way: boundaries by epoch, weights and state."""
    torch.manual_seed(0)
    model = convnet()
    optimizer = sgd(model)
    options.setdefault("schedule", lowcal.Fixed({2: 1, 4: 2}))
    local = lowcal.LoCal(model, optimizer, epochs=epochs, example_inputs=images(1)[0][0], **options)
    boundaries = []
    for epoch in range(epochs):
        before = local.boundary
        train_epoch(model, optimizer, local, images(2, seed=epoch))
        boundaries.append(local.boundary)
        assert before <= local.boundary < len(local.layers)
        assert local.sign in (-1, 1)
        assert local.change >= 0
    assert all(value.isfinite().all() for value in weights(model).values())
    assert int(local._local_layers.updates.skipped) == 0
    state = local.state_dict()
    local.detach()
    return boundaries, weights(model), state


def trains_alike_twice(**options):
    first, second = trains(**options), trains(**options)
    assert same(first, second)
    return first
