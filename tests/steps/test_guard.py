"""Steps whose loss or gradient is NaN or infinite."""

import copy

import pytest
import torch
from torch import nn

import lowcal
from lowcal import LowcalError
from lowcal.methods.base import SGD
from lowcal.methods.boundary import Local
from lowcal.steps.modes import build_step
from lowcal.steps.step import StepOptions, build_scaler

from ..networks import convnet, images
from ..support import same, snapshot, weights
from ..training.runs import log, make_run, run_on, settings, spoilt, state

CPU = torch.device("cpu")
SPOILS = {
    "nan": lambda x: x * torch.nan,
    "inf": lambda x: x * torch.inf,
    "one example": lambda x: x.index_fill(0, torch.tensor([1]), torch.inf),
}


class Gradient(torch.autograd.Function):
    """Leaves what passes as it is, and makes its gradient NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def built(fused, *, boundary=0, precision="float32", guard=True):
    """A convolutional network with normalisation, in training with local layers."""
    torch.manual_seed(2)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused)
    method = Local(model, optimizer, settings({1: 1}), epochs=9, example_inputs=images(1)[0][0])
    if boundary:
        method.move_to(boundary)
    scaler = build_scaler(CPU, precision)
    if scaler is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, backoff_factor=0.999999, growth_interval=10**6)
    step = build_step("eager", model, (optimizer,), method, StepOptions(CPU, precision, scaler, guard=guard))
    return model, optimizer, step


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("boundary", [0, 2])
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("at", [0, 1])
def test_a_spoilt_batch_leaves_no_trace(fused, boundary, spoil, at):
    """In the first step too, before there is momentum; running statistics are a part of it."""
    model, optimizer, step = built(fused, boundary=boundary)
    plain, plain_optimizer, plain_step = built(fused, boundary=boundary)  # never sees that batch
    for index, (inputs, labels) in enumerate(images(3)):
        if index == at:
            before = weights(model)
            step(SPOILS[spoil](inputs), labels)
            assert bool(step.skipped)
            assert same(weights(model), before)
        step(inputs, labels)
        assert not bool(step.skipped)
        plain_step(inputs, labels)
    assert same(weights(model), weights(plain))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    ours, theirs = (
        [entry["momentum_buffer"] for entry in o.state_dict()["state"].values()] for o in (optimizer, plain_optimizer)
    )
    assert same(ours, theirs)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("boundary", [0, 2])
def test_a_gradient_that_is_not_finite_counts_where_the_loss_is(fused, boundary):
    model, optimizer, step = built(fused, boundary=boundary)
    batches = images(3)
    step(*batches[0])
    before = snapshot(model, optimizer)["weights"], copy.deepcopy(optimizer.state_dict())
    handle = model.head.register_forward_pre_hook(lambda module, inputs: Gradient.apply(inputs[0]))
    loss = step(*batches[1])
    handle.remove()
    assert loss.isfinite()
    assert bool(step.skipped)
    assert same((snapshot(model, optimizer)["weights"], optimizer.state_dict()), before)
    step(*batches[2])
    assert not bool(step.skipped)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("guard", [True, False])
def test_under_a_scaler_too(fused, guard):
    model, _, step = built(fused, boundary=2, precision="fp16", guard=guard)
    inputs, labels = images(1)[0]
    before = {name: value.clone() for name, value in model.named_parameters()}
    step(inputs * torch.inf, labels)
    assert bool(step.skipped)
    assert same(before, dict(model.named_parameters()))
    if guard:
        step(inputs, labels)
        assert not bool(step.skipped)
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_loss_alone_that_is_not_finite_skips_under_a_scaler():
    """Its gradients may be finite all the same."""

    class Endless(SGD):
        def penalty(self, loss):
            return torch.full_like(loss, torch.inf)

    torch.manual_seed(2)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    method = Endless(model, optimizer, None, epochs=1, example_inputs=images(1)[0][0])
    for precision in ("float32", "fp16"):
        scaler = build_scaler(CPU, precision)
        step = build_step("eager", model, (optimizer,), method, StepOptions(CPU, precision, scaler, guard=True))
        before = weights(model)
        step(*images(1)[0])
        assert bool(step.skipped)
        assert same(weights(model), before)


def test_a_first_step_that_a_scaler_skips_leaves_momentum_at_zero():
    model, optimizer, step = built(True, precision="fp16", guard=False)
    inputs, labels = images(1)[0]
    step(inputs * torch.inf, labels)
    assert all(not entry["momentum_buffer"].any() for entry in optimizer.state.values())
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("method", ["local", "prune", "stochastic-depth"])
def test_a_guard_that_has_nothing_to_do_changes_nothing(tmp_path, method):
    plain = run_on(make_run(tmp_path / "plain", method, fused=True), 4)
    guarded = run_on(make_run(tmp_path / "guarded", method, fused=True, max_skips=3), 4)
    # With a guard eta is a number on the device, in single precision, and its quotient may be rounded otherwise.
    compare = torch.testing.assert_close if method == "local" else lambda a, b: same(a, b) or pytest.fail("differs")
    compare(state(plain)["model"], state(guarded)["model"])
    assert {record["skipped_steps"] for run in (plain, guarded) for record in log(run)} == {0}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_run_survives_and_reports_them(tmp_path, fused):
    model = spoilt(2, 3, 5 * 3 + 2, spoil=lambda scores: scores * torch.nan)
    run = run_on(make_run(tmp_path / "run", model=model, max_skips=2, fused=fused))
    assert [record["skipped_steps"] for record in log(run)] == [2, 0, 0, 1, 0, 0]
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert run.method.boundary == 4


def test_more_than_so_many_in_a_row_end_it_also_over_an_epoch_s_end_and_a_resume(tmp_path):
    places = (5 * 2 + 4, 5 * 2 + 5, 5 * 3 + 1)
    run = make_run(tmp_path / "one", model=spoilt(*places, spoil=lambda scores: scores * torch.nan), max_skips=2)
    with pytest.raises(LowcalError, match=r"3 steps in a row were skipped.* at step 1 of epoch 4 of 6") as error:
        run_on(run)
    assert "the last checkpoint is that of epoch 3" in str(error.value)
    assert "\n" not in str(error.value)
    run = make_run(tmp_path / "two", model=spoilt(*places[:2], spoil=lambda scores: scores * torch.nan), max_skips=2)
    run_on(run, 3)
    run = make_run(tmp_path / "two", model=spoilt(1, spoil=lambda scores: scores * torch.nan), max_skips=2)
    run.resume()
    with pytest.raises(LowcalError, match=r"3 steps in a row were skipped.* at step 1 of epoch 4 of 6"):
        run_on(run)


def test_an_epoch_of_skipped_steps_alone_ends_it(tmp_path):
    run = make_run(tmp_path / "run", model=spoilt(*range(1, 6), spoil=lambda scores: scores * torch.nan), max_skips=9)
    with pytest.raises(LowcalError, match="every step was skipped, the last at step 5 of epoch 1 of 6"):
        run_on(run)


def test_no_local_update_is_made_from_activations_that_are_not_finite():
    """Without a guard as well: only the layers that SGD trains are spoilt, and the run stops."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = lowcal.LoCal(model, optimizer, epochs=3, example_inputs=torch.ones(1, 4))
    local.move_to(1)
    before = model[0].weight.detach().clone()
    model(torch.full((3, 4), torch.nan)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert local._local_layers.updates.skipped == 1
