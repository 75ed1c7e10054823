"""Mistakes: one line that names what, and a model, optimizer and controller that are as they were."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowcal
from lowcal import LoCal, LowcalError

from .networks import convnet, images, mlp, vectors
from .support import changed, refused, same, sgd, train_step, weights

INPUTS = vectors(1)[0][0]


def make(model=None, optimizer=None, **options):
    model = model or mlp()
    return LoCal(model, optimizer or sgd(model), **{"epochs": 9, "example_inputs": INPUTS, **options})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.again, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.again(self.again(self.a(x))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.b(self.decoder(self.encoder(x)))


def test_a_layer_that_runs_twice_in_one_forward():
    model = Twice()
    optimizer = sgd(model)
    with refused("'again'", "twice", model=model, optimizer=optimizer):
        make(model, optimizer)


def test_a_layer_that_comes_to_run_twice_after_the_first_forward():
    class Later(Twice):
        times = 1

        def forward(self, x):
            x = self.a(x)
            for _ in range(self.times):
                x = self.again(x)
            return self.b(x)

    model = Later()
    optimizer = sgd(model)
    local = make(model, optimizer)
    local.move_to(2)
    train_step(model, optimizer, vectors(1)[0])
    model.times = 2
    with refused("'again'", "twice"):
        train_step(model, optimizer, vectors(1)[0])


def test_two_layers_that_share_one_weight():
    model = Tied()
    optimizer = sgd(model)
    with refused("'encoder'", "'decoder'", model=model, optimizer=optimizer):
        make(model, optimizer)
    local = make(model, optimizer, example_inputs=None)
    with refused("'encoder'", "'decoder'", model=model, optimizer=optimizer, local=local):
        model(INPUTS)


@pytest.mark.parametrize("model", [nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.Sequential(nn.Bilinear(4, 4, 2))])
def test_a_model_without_a_layer(model):
    optimizer = sgd(model)
    with refused("layer", model=model, optimizer=optimizer):
        LoCal(model, optimizer, epochs=9)


def test_a_model_whose_forward_runs_no_layer():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return x @ self.a.weight

    model = Bypass()
    optimizer = sgd(model)
    with refused("layer", model=model, optimizer=optimizer):
        make(model, optimizer)


def test_an_optimizer_that_does_not_hold_the_layers():
    model = mlp()
    head_only = sgd(model.four)
    with refused("'one'", "optimizer", model=model, optimizer=head_only):
        make(model, head_only)
    another_model = sgd(mlp())
    with refused("'one'", "optimizer", model=model, optimizer=another_model):
        make(model, another_model)


def test_a_lazy_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LowcalError, match=r"'1'.*lazy"):
        LoCal(model, optimizer, epochs=9, example_inputs=INPUTS)
    assert isinstance(model[1], nn.LazyLinear)
    model(INPUTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert make(model, optimizer).layers == ("0", "1")


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "prune"],
)
def test_a_weight_computed_from_other_parameters(wrap):
    model = mlp()
    wrap(model.two)
    optimizer = sgd(model)
    with refused("'two'", model=model, optimizer=optimizer):
        make(model, optimizer)


def test_a_second_controller():
    model = convnet()
    optimizer = sgd(model)
    inputs = images(1)[0][0]
    first = make(model, optimizer, example_inputs=inputs)
    with refused("'conv1'", "detach", model=model, optimizer=optimizer, local=first):
        make(model, optimizer, example_inputs=inputs)
    first.move_to(2)
    train_step(model, optimizer, images(1)[0])
    with refused("'conv1'", "detach", model=model, optimizer=optimizer, local=first):
        make(model, optimizer, example_inputs=None)
    first.detach()
    make(model, optimizer, example_inputs=inputs)


def test_a_second_controller_on_a_part_or_a_whole():
    whole = nn.Sequential(mlp(), nn.Linear(3, 3))
    optimizer = sgd(whole)
    first = make(whole, optimizer)
    with refused("'one'", "detach", model=whole, optimizer=optimizer, local=first):
        make(whole[0], optimizer)
    first.detach()
    part = make(whole[0], optimizer)
    with refused("'0.one'", "detach", model=whole, optimizer=optimizer, local=part):
        make(whole, optimizer)


def test_a_refused_controller_leaves_the_model_free():
    model = mlp()
    with pytest.raises(LowcalError):
        make(model, schedule=lowcal.Fixed({1: 7}))
    with pytest.raises(LowcalError):
        make(model, norm_stats="x")
    make(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("epochs", "9"), ("norm_stats", "x"), ("norm_stats", None)],
)
def test_settings_out_of_range(name, value):
    model = mlp()
    optimizer = sgd(model)
    with refused(name, value, model=model, optimizer=optimizer):
        make(model, optimizer, **{name: value})


@pytest.mark.parametrize("example", [True, False])
def test_a_schedule_that_wants_more_layers_than_there_are(example):
    model = mlp()
    optimizer = sgd(model)
    options = {"schedule": lowcal.Fixed({2: 4})}
    with refused("4", "3", model=model, optimizer=optimizer):
        if example:
            make(model, optimizer, **options)
        else:
            local = make(model, optimizer, example_inputs=None, **options)
            try:
                model(INPUTS)
            finally:
                local.detach()


def test_end_epoch_and_move_to_before_any_forward():
    model = mlp()
    optimizer = sgd(model)
    local = make(model, optimizer, example_inputs=None)
    with refused("end_epoch", model=model, optimizer=optimizer, local=local):
        local.end_epoch(1.0)
    with refused("move_to", model=model, optimizer=optimizer, local=local):
        local.move_to(1)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), "low", None])
def test_a_loss_that_is_no_finite_number(loss):
    model = mlp()
    optimizer = sgd(model)
    local = make(model, optimizer, schedule=lowcal.NormTrend(alpha=2.0, shift=1, interval=1))
    for _ in range(2):
        train_step(model, optimizer, vectors(1)[0])
        local.end_epoch(1.0)
    local.move_to(2)
    train_step(model, optimizer, vectors(1)[0])
    with refused("loss", model=model, optimizer=optimizer, local=local):
        local.end_epoch(loss)
    local.end_epoch(torch.tensor(1.0))  # training can go on


@pytest.mark.parametrize("target", [1, 0, -1, 4, 5, 2.5, "3", None])
def test_a_boundary_behind_the_present_one_or_beyond_the_network(target):
    model = mlp()
    optimizer = sgd(model)
    local = make(model, optimizer)
    local.move_to(2)
    train_step(model, optimizer, vectors(1)[0])
    with refused(target, "2", "3", model=model, optimizer=optimizer, local=local):
        local.move_to(target)
    local.move_to(2)
    local.move_to(3)


@pytest.mark.parametrize("target", [-1, 1, 4, 2.5])
def test_a_schedule_of_ones_own_that_goes_astray(target):
    class Astray(lowcal.NormTrend):
        def __call__(self, progress):
            return target

    model = mlp()
    optimizer = sgd(model)
    local = make(model, optimizer, schedule=Astray())
    local.move_to(2)
    train_step(model, optimizer, vectors(1)[0])
    with refused(target, model=model, optimizer=optimizer, local=local):
        local.end_epoch(1.0)


def test_an_error_in_the_middle_of_training_spoils_nothing():
    """Refused calls between the steps: the run ends bitwise where it ends without them."""
    results = []
    for disturbed in (False, True):
        torch.manual_seed(4)
        model = mlp()
        optimizer = sgd(model)
        local = make(model, optimizer, schedule=lowcal.Fixed({1: 1, 2: 2}))
        for epoch in range(4):
            for batch in vectors(2, seed=epoch):
                if disturbed:
                    for wrong in (
                        lambda: local.end_epoch(math.nan),  # noqa: B023
                        lambda: local.move_to(9),  # noqa: B023
                        lambda: local.load_state_dict({}),  # noqa: B023
                        lambda: make(model, optimizer),  # noqa: B023
                    ):
                        with pytest.raises(LowcalError):
                            wrong()
                train_step(model, optimizer, batch)
            local.end_epoch(1.0)
        results.append((weights(model), local.state_dict()))
    assert same(*results)
    assert not changed(results[0][0], model)


def test_a_layer_that_the_user_froze_may_be_left_out_of_the_optimizer():
    model = mlp()
    frozen = next(model.children()).requires_grad_(False)
    before = frozen.weight.clone()
    optimizer = sgd(nn.ModuleList(list(model.children())[1:]))
    local = make(model, optimizer)
    local.move_to(2)
    train_step(model, optimizer, vectors(1)[0])
    assert torch.equal(frozen.weight, before)
    local.detach()
    assert not frozen.weight.requires_grad


def test_a_detached_controller_moves_nothing_more():
    model = mlp()
    local = make(model, sgd(model))
    local.move_to(1)
    local.detach()
    for call in (lambda: local.end_epoch(1.0), lambda: local.move_to(2)):
        with pytest.raises(LowcalError, match="detached from its model; build a new one"):
            call()
    assert local.boundary == 1
    assert all(parameter.requires_grad for parameter in model.parameters())
