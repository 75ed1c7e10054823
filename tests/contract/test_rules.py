"""One set of checks over every rule and supervision."""

import functools
import pickle

import pytest
import torch
from torch import nn

import lowcal
from lowcal import Frozen, Hebbian, LossTrend, Refresh

from ..networks import convnet
from ..support import same
from . import properties

RULES = [
    Hebbian(),
    Hebbian(lr=0.1, decay=0.1, decay_every=2),
    Hebbian(scale="relative"),
    Hebbian(every=3),
    Hebbian(lr=0.1, decay=0.1, decay_every=1, decay_from="switch"),
    Frozen(),
    Refresh(),
    Refresh(every=3),
]
SUPERVISIONS = [LossTrend(), LossTrend(sign="kept")]
LAYERS = [nn.Linear(4, 3), nn.Conv1d(4, 3, 2), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 2, 1)]


@pytest.mark.parametrize("value", RULES + SUPERVISIONS, ids=repr)
def test_is_a_frozen_value(value):
    properties.is_a_frozen_dataclass(value)
    properties.is_a_value(value)


def test_different_settings_are_different_rules():
    assert len(set(RULES)) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_step_size_never_grows_and_is_pure(rule):
    sizes = [rule.step_size(epoch) for epoch in range(200)]
    assert sizes == [rule.step_size(epoch) for epoch in range(200)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size >= 0 for size in sizes)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.collects], ids=repr)
def test_update_is_pure_and_fits_the_weight(rule, layer):
    inputs = torch.randn(2, 4, *[5] * (layer.weight.dim() - 2))
    outputs = layer(inputs)
    before = [t.detach().clone() for t in (inputs, outputs, layer.weight)]
    settings = pickle.dumps(rule)
    first, second = rule.update(layer, inputs, outputs), rule.update(layer, inputs, outputs)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()  # the caller may overwrite it
    assert first.shape == layer.weight.shape
    assert not first.requires_grad
    assert same(before, [t.detach() for t in (inputs, outputs, layer.weight)])
    assert pickle.dumps(rule) == settings


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_apply_moves_in_proportion_to_the_step_and_leaves_what_it_cannot_use(rule):
    for step in (0.5, -0.25, torch.tensor(0.5)):
        weights = [torch.randn(3, 4), torch.randn(2), torch.randn(5), torch.randn(2, 2)]
        updates = [torch.randn(3, 4), torch.zeros(2), torch.full((5,), torch.inf), torch.tensor([[1.0, torch.nan]] * 2)]
        before = [weight.clone() for weight in weights]
        direction = updates[0].clone()
        skipped = rule.apply(weights, updates, step)
        assert skipped.dim() == 0
        assert int(skipped) == (0 if isinstance(rule, Frozen) else 3)
        assert same(before[1:], weights[1:])
        if isinstance(rule, Frozen):
            assert torch.equal(weights[0], before[0])
            continue
        length = float(step) * (before[0].norm() if rule.scale == "relative" else 1.0)
        torch.testing.assert_close(weights[0], before[0] + length * direction / direction.norm())


@functools.cache
def trained(rule):
    return properties.trains_alike_twice(rule=rule)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_works_in_training(rule):
    assert trained(rule)[0] == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("rule", [RULES[0], Refresh()], ids=repr)
def test_works_in_training_by_running_statistics(rule):
    assert properties.trains_alike_twice(rule=rule, norm_stats="running")[0] == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("supervision", [*SUPERVISIONS, None], ids=repr)
def test_supervision_works_in_training(supervision):
    properties.trains_alike_twice(supervision=supervision)


@pytest.mark.parametrize("supervision", SUPERVISIONS, ids=repr)
@pytest.mark.parametrize("losses", [(), (1.0,), (1.0, 2.0), (2.0, 1.0), (0.0, 0.0)])
def test_supervision_is_pure(supervision, losses):
    assert properties.is_pure(supervision, losses) in (-1, 1)


def test_a_supervision_of_ones_own():
    def always_back(losses):
        return -1

    _, _, state = properties.trains(supervision=always_back)
    assert state["sign"] == -1


def test_the_rules_differ_in_what_they_do():
    first = convnet().state_dict()
    ends = [trained(rule)[1] for rule in RULES]
    assert not any(same(a, b) for index, a in enumerate(ends) for b in ends[:index])
    assert all(list(end) == list(first) for end in ends)


def test_defaults_of_the_controller_are_the_published_ones():
    options = {"rule": lowcal.Hebbian(), "supervision": lowcal.LossTrend(), "norm_stats": "batch"}
    assert same(properties.trains(), properties.trains(**options))
