"""Normalisation before the transition layer: batch statistics as ever, or the running ones, unchanged."""

import copy

import pytest
import torch
from torch import nn

import lowcal

from .networks import Residual, convnet, images
from .support import same, sgd, train_step, weights


def prepared(norm_stats, boundary=2, model=None):
    """A network with running statistics worth the name, at a boundary."""
    model = model or convnet()
    optimizer = sgd(model)
    local = lowcal.LoCal(
        model, optimizer, epochs=9, rule=lowcal.Frozen(), norm_stats=norm_stats, example_inputs=images(1)[0][0]
    )
    for batch in images(3):
        train_step(model, optimizer, batch)
    local.move_to(boundary)
    return model, optimizer, local


def watched(model, name):
    """Runs the network once in training; the input and output of its module `name`."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, output: seen.append((args[0].clone(), output.clone())))
    model(images(1, seed=9)[0][0])
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["norm1", "norm2", "norm3"])
def test_batch_statistics_go_on_as_in_plain_training(name):
    model, _, _ = prepared("batch")
    norm = model.get_submodule(name)
    before = copy.deepcopy(norm)
    inputs, outputs = watched(model, name)
    mean = inputs.mean((0, 2, 3))
    centred = inputs - mean[:, None, None]
    variance = centred.pow(2).mean((0, 2, 3))
    expected = centred / (variance + norm.eps).sqrt()[:, None, None]
    expected = expected * before.weight[:, None, None] + before.bias[:, None, None]
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    count = inputs.numel() / inputs.shape[1]
    torch.testing.assert_close(norm.running_mean, 0.9 * before.running_mean + 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 * before.running_var + 0.1 * variance * count / (count - 1))
    assert norm.num_batches_tracked == before.num_batches_tracked + 1


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_running_statistics_are_used_and_stay(name):
    model, optimizer, _ = prepared("running")
    norm = model.get_submodule(name)
    before = copy.deepcopy(norm)
    for round in range(3):
        inputs, outputs = watched(model, name)
        scale = before.weight / (before.running_var + norm.eps).sqrt()
        expected = (inputs - before.running_mean[:, None, None]) * scale[:, None, None] + before.bias[:, None, None]
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
        assert same(dict(before.state_dict()), dict(norm.state_dict()))
        model.eval()
        model(images(1)[0][0])
        model.train()  # as loops do at the start of each epoch
        train_step(model, optimizer, images(1, seed=round)[0])


def test_the_suffix_normalises_by_the_batch_either_way():
    model, _, _ = prepared("running")
    before = copy.deepcopy(model.norm3)
    _inputs, outputs = watched(model, "norm3")
    torch.testing.assert_close(outputs.mean((0, 2, 3)), before.bias, rtol=1e-3, atol=1e-4)
    assert model.norm3.num_batches_tracked == before.num_batches_tracked + 1
    assert not torch.equal(model.norm3.running_mean, before.running_mean)


@pytest.mark.parametrize("norm_stats", ["batch", "running"])
def test_a_normalisation_layer_follows_the_layer_run_before_it(norm_stats):
    """In `Residual` the input's own normalisation follows the first layer, which runs after it."""
    model, _, local = prepared(norm_stats, boundary=1, model=Residual())
    order = [("input_norm", 1), ("first_norm", 2), ("second_norm", 3)]
    for boundary in (1, 2, 3):
        local.move_to(boundary)
        before = weights(model)
        model(images(1, seed=9)[0][0])
        for name, since in order:
            fixed = norm_stats == "running" and boundary >= since
            assert torch.equal(model.state_dict()[f"{name}.running_mean"], before[f"{name}.running_mean"]) is fixed
            assert model.get_submodule(name).weight.requires_grad is (boundary < since)


def test_detach_lets_the_batch_decide_again():
    model, _, local = prepared("running")
    train_step(model, local.optimizer, images(1)[0])
    local.detach()
    before = weights(model)
    model(images(1, seed=9)[0][0])
    assert not torch.equal(model.norm1.running_mean, before["norm1.running_mean"])
    assert all(module.training for module in model.modules())


def test_a_normalisation_layer_that_the_user_set_to_eval_stays_so():
    model, optimizer, local = prepared("running")
    model.norm3.eval()
    train_step(model, optimizer, images(1)[0])
    local.detach()
    assert not model.norm3.training


@pytest.mark.parametrize("norm_stats", ["batch", "running"])
def test_normalisation_without_running_statistics(norm_stats):
    model = convnet()
    model.norm1 = nn.BatchNorm2d(4, track_running_stats=False)
    model.norm2 = nn.GroupNorm(2, 4)
    model, optimizer, _local = prepared(norm_stats, model=model)
    for batch in images(2):
        assert train_step(model, optimizer, batch).isfinite()


@pytest.mark.parametrize("norm_stats", ["batch", "running"])
def test_evaluation_is_that_of_the_plain_network(norm_stats):
    model, _, _ = prepared(norm_stats)
    plain = convnet()
    plain.load_state_dict(model.state_dict())
    inputs = images(1, seed=9)[0][0]
    assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
