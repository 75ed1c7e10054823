"""What one step does to the local layers: Eq. 4, its sign, its length over the epochs, and when it is left out."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import lowcal

from .networks import Optional, convnet, images, mlp, vectors
from .reference import local_step, weight_product
from .support import changed, sgd, train_step, weights


def controller(model, boundary, *, optimizer=None, epochs=90, **options):
    """A LoCal whose boundary is set by hand, and its optimizer."""
    optimizer = optimizer or sgd(model)
    example = (vectors if hasattr(model, "one") else images)(1)[0][0].to(next(model.parameters()).dtype)
    options.setdefault("schedule", lowcal.Fixed({epochs: 1}))
    local = lowcal.LoCal(model, optimizer, epochs=epochs, example_inputs=example, **options)
    local.move_to(boundary)
    return local, optimizer


def test_a_step_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    optimizer = SGD(model.parameters(), lr=1.0)
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=lowcal.Hebbian(lr=0.5), example_inputs=torch.zeros(1, 2))
    local.move_to(1)
    model(torch.tensor([[2.0, 0.0], [0.0, 2.0]])).sum().backward()
    # z = a W^T + b = [[3, 0], [1, -2]]; dW = z^T a = [[6, 2], [0, -4]]; ||dW|| = sqrt(56)
    before = weights(model)
    optimizer.step()
    expected = torch.tensor([[1.0, 0.0], [0.0, -1.0]]) + 0.5 * torch.tensor([[6.0, 2.0], [0.0, -4.0]]) / 56**0.5
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert changed(before, model) == {"0.weight", "2.weight", "2.bias"}


@pytest.mark.parametrize(("boundary", "sign", "relative"), [(1, +1, True), (2, -1, False), (3, -1, True)])
def test_a_step_is_equation_4(boundary, sign, relative):
    model = convnet().double()
    rule = lowcal.Hebbian(lr=0.02, scale="relative" if relative else "absolute")
    local, optimizer = controller(model, boundary, rule=rule)
    inputs, labels = images(1)[0]
    batch = (inputs.double(), labels)
    losses = [1.0, 2.0] if sign < 0 else [2.0, 1.0]
    for loss in losses:
        train_step(model, optimizer, batch)
        local.end_epoch(loss)
    assert local.sign == sign

    before = weights(model)
    expected, a = {}, batch[0]
    with torch.no_grad():
        for name, module in list(model.named_children()):
            z = module(a) if "norm" not in name else nn.functional.batch_norm(
                a, None, None, module.weight, module.bias, training=True
            )  # fmt: skip
            if name in local.layers[:boundary]:
                update = weight_product(module, a, z.clone())
                expected[f"{name}.weight"] = local_step(module.weight, update, 0.02, sign, relative=relative)
            a = z.clone()
    train_step(model, optimizer, batch)
    for key, value in expected.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-10, atol=1e-12)
    learned = {key for key in changed(before, model) if key.rpartition(".")[2] in ("weight", "bias")}
    suffix = {
        f"{name}.{key}"
        for name, module in list(model.named_children())[3 * boundary :]
        for key, _ in module.named_parameters()
    }
    assert learned == set(expected) | suffix


def test_weights_move_at_the_optimizer_step_and_not_before():
    model = mlp()
    _, optimizer = controller(model, 2)
    before = weights(model)
    loss = nn.functional.cross_entropy(model(vectors(1)[0][0]), vectors(1)[0][1])
    assert not changed(before, model)
    loss.backward()
    assert not changed(before, model)
    optimizer.step()
    assert changed(before, model) == {
        "one.weight", "two.weight", "three.weight", "three.bias", "four.weight", "four.bias"
    }  # fmt: skip
    before = weights(model)
    optimizer.zero_grad()
    optimizer.step()
    assert not {"one.weight", "two.weight"} & changed(before, model)  # an update is used once


def step_lengths(local, model, optimizer, batch, layer="one"):
    before = getattr(model, layer).weight.detach().clone()
    train_step(model, optimizer, batch)
    return float((getattr(model, layer).weight.detach() - before).double().norm())


@pytest.mark.parametrize(("decay", "lengths"), [(0.5, [0.01, 0.005, 0.0025]), (0.1, [0.01, 0.001, 0.0001])])
def test_the_published_decay_counts_from_epoch_0(decay, lengths):
    model = mlp().double()
    local, optimizer = controller(model, 1, rule=lowcal.Hebbian(decay=decay))
    batch = (vectors(1)[0][0].double(), vectors(1)[0][1])
    found, rates = {}, {}
    for epoch in range(90):
        length = step_lengths(local, model, optimizer, batch)
        if epoch % 30 in (0, 29):
            rates[epoch], found[epoch] = local.lr, length
        local.end_epoch(1.0)
    expected = {epoch: lengths[epoch // 30] for epoch in found}
    assert found == pytest.approx(expected, rel=1e-9)
    assert rates == pytest.approx(expected, rel=1e-9)


def test_the_sign_follows_the_losses_of_the_last_two_epochs():
    model = mlp()
    local, optimizer = controller(model, 1)
    batch = vectors(1)[0]
    signs, agreement = [], []
    for loss in (3.0, 2.0, 2.5, 2.5, 2.6, 1.0, 1.0):
        signs.append(local.sign)
        a, before = batch[0], model.one.weight.detach().clone()
        update = weight_product(model.one, a, model.one(a))
        train_step(model, optimizer, batch)
        move = (model.one.weight.detach() - before).double()
        agreement.append(round(float((move * update).sum() / move.norm() / update.norm())))
        local.end_epoch(loss)
    # the sign of an epoch comes from the two before it
    assert signs == agreement == [1, 1, 1, -1, 1, -1, 1]


def test_without_supervision_the_sign_stays():
    model = mlp()
    local, optimizer = controller(model, 1, supervision=None)
    for loss in (1.0, 2.0, 3.0):
        train_step(model, optimizer, vectors(1)[0])
        local.end_epoch(loss)
        assert local.sign == 1


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_zero_or_non_finite_norm_leaves_the_weight_and_is_counted(value):
    class Gate(nn.Module):
        """Makes its input useless for layer two alone."""

        def forward(self, x):
            return torch.full_like(x, value)

    model = mlp(bias=False)
    model.act1, model.act2 = Gate(), nn.ReLU()
    model.act2.forward = lambda x: torch.ones_like(x)
    local, optimizer = controller(model, 2)
    before = weights(model)
    for count in (1, 2):
        train_step(model, optimizer, vectors(1)[0])
        assert int(local._local_layers.updates.skipped) == count
    assert torch.equal(model.two.weight, before["two.weight"])
    assert "one.weight" in changed(before, model)
    assert model.one.weight.isfinite().all()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_updates_of_micro_batches_in_half_precision_add_up_in_single_precision(passes):
    applied = []

    class Spy(lowcal.Hebbian):
        def apply(self, weights, updates, step):
            applied.extend(update.clone() for update in updates)
            return super().apply(weights, updates, step)

    model = mlp()
    _, optimizer = controller(model, 1, rule=Spy())
    expected = torch.zeros_like(model.one.weight)
    for inputs, labels in vectors(passes):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = nn.functional.linear(inputs, model.one.weight, model.one.bias)
            expected += lowcal.hebbian_update(model.one, inputs, outputs.detach())
            loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
    optimizer.step()
    assert torch.equal(applied[0].float(), expected)
    assert applied[0].dtype == (torch.bfloat16 if passes == 1 else torch.float32)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_step_makes_an_update(every):
    model = mlp()
    local, optimizer = controller(model, 2, rule=lowcal.Hebbian(every=every))
    moved = []
    for index, batch in enumerate(vectors(4 * every)):
        before = weights(model)
        train_step(model, optimizer, batch)
        moved.append({"one.weight", "two.weight"} <= changed(before, model))
        assert moved[-1] or not {"one.weight", "two.weight"} & changed(before, model)
        if index == every:
            local.end_epoch(1.0)  # the count goes on over epochs
    first = moved.index(True)
    assert [index for index, move in enumerate(moved) if move] == list(range(first, 4 * every, every))


def test_a_layer_that_a_step_does_not_run_makes_no_update():
    model = Optional()
    _, optimizer = controller(model, 3)
    for skip in (False, True, True, False):
        model.skip = skip
        before = weights(model)
        train_step(model, optimizer, vectors(1)[0])
        assert ("two.weight" in changed(before, model)) is not skip
        assert {"one.weight", "three.weight"} <= changed(before, model)


def test_a_step_without_the_transition_layer_works():
    model = Optional()
    local, optimizer = controller(model, 1)
    model.skip = True
    before = weights(model)
    train_step(model, optimizer, vectors(1)[0])
    assert changed(before, model) == {"one.weight"} | {
        f"{name}.{key}" for name in ("three", "head") for key in ("weight", "bias")
    }
    local.end_epoch(1.0)
    assert local.change == 0.0


def test_the_change_of_the_transition_layer_is_end_minus_start_of_the_epoch():
    seen = []

    class Spy(lowcal.NormTrend):
        def __call__(self, progress):
            seen.append(progress)
            return {2: 1, 4: 3}.get(progress.epoch, progress.boundary)

    model = mlp()
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=7, schedule=Spy(), example_inputs=vectors(1)[0][0])
    norms, moves = [], []
    for epoch in range(6):
        layer = getattr(model, local.layers[local.boundary])
        start = layer.weight.detach().clone()
        for batch in vectors(3, seed=epoch):
            train_step(model, optimizer, batch)
        norms.append(float((layer.weight.detach() - start).norm()))
        moves.append(local.end_epoch(1.0))
        assert local.change == pytest.approx(norms[-1], rel=1e-5)
    assert moves == [False, True, False, True, False, False]
    assert [p.epoch for p in seen] == [1, 2, 3, 4, 5, 6]  # the coming epoch
    assert [p.boundary for p in seen] == [0, 0, 1, 1, 3, 3]
    assert {(p.epochs, p.layers) for p in seen} == {(7, 4)}
    expected = [norms[:1], norms[:2], norms[2:3], norms[2:4], norms[4:5], norms[4:]]  # of the present layer only
    for progress, changes in zip(seen, expected, strict=True):
        assert progress.changes == pytest.approx(changes, rel=1e-5)
