"""Batch normalisation over processes, beside one process with the whole mini-batch."""

import copy

import torch
from torch import nn

from lowcal.norms import separate, synchronise

from .world import together

SHARES = [slice(0, 5), slice(5, 7), slice(7, 7)]  # the last is empty


def network(momentum=0.1, affine=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum, affine=affine), nn.ReLU())


def images():
    generator = torch.Generator().manual_seed(1)
    return 3 + 2 * torch.randn(7, 2, 5, 6, generator=generator), torch.randn(7, 4, 3, 4, generator=generator)


def passes(model, x, slopes, times=3):
    """Trains nothing, but makes gradients, and moves the running statistics."""
    for _ in range(times):
        model.zero_grad()
        (model(x) * slopes).sum().backward()


def compare_all(ranks):
    for options in ({}, {"momentum": None}, {"affine": False}):
        compare(ranks, options)


def compare(ranks, options):
    x, slopes = images()
    whole, model = network(**options), network(**options)
    passes(whole, x, slopes)
    synchronise(model)
    own = SHARES[ranks.rank]
    passes(model, x[own], slopes[own])
    assert list(model.state_dict()) == list(whole.state_dict())
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ranks.sum(ours.grad), theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x[own]), whole(x)[own])
    torch.testing.assert_close(model.eval()(x), whole.eval()(x))


def test_it_is_that_of_the_whole_mini_batch():
    together(3, compare_all)


def test_alone_it_is_the_plain_one_and_can_be_taken_back():
    x, slopes = images()
    plain, model = network(), network()
    kept = copy.deepcopy(model)
    synchronise(model)
    passes(plain, x, slopes)
    passes(model, x, slopes)
    assert all(
        torch.equal(*pair) for pair in zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    )
    separate(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in kept.modules()]
