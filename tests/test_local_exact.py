"""A run with LoCal against the plain loop and against a loop written by hand, bit for bit where both add alike."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import lowcal

from .networks import Optional, convnet, images, mlp, vectors
from .reference import hand_loop, local_step, weight_product
from .support import OPTIMIZERS, ORDERS, changed, same, sgd, train_epoch, train_step, weights


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_boundary_0_is_bitwise_the_plain_loop(optimizer_name, example):
    states = []
    for with_local in (False, True):
        torch.manual_seed(3)
        model = convnet()
        model.act1 = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))  # the random numbers must be the same ones too
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        local = None
        if with_local:
            inputs = images(1)[0][0] if example else None
            local = lowcal.LoCal(model, optimizer, epochs=90, example_inputs=inputs)
        for epoch in range(3):
            train_epoch(model, optimizer, local, images(3, seed=epoch))
        states.append((weights(model), optimizer.state_dict(), torch.rand(1)))
    assert same(*states)


CASES = [(1, "conv2", "sgd"), (2, "conv3", "adam"), (3, "head", "adamw")]  # boundary, transition layer, optimizer


@pytest.mark.parametrize(("boundary", "layer", "optimizer_name"), CASES)
def test_frozen_is_bitwise_the_loop_by_hand(boundary, layer, optimizer_name):
    model = convnet()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    by_hand, reference_optimizer = copy.deepcopy((model, optimizer))
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=lowcal.Frozen(), example_inputs=images(1)[0][0])
    for batch in images(3):
        train_step(model, optimizer, batch)
        train_step(by_hand, reference_optimizer, batch)
    local.move_to(boundary)
    for batch in images(5, seed=7):
        train_step(model, optimizer, batch)
        hand_loop(by_hand, reference_optimizer, layer, batch, eta=0.0)
    assert same(weights(model), weights(by_hand))


@pytest.mark.parametrize(("boundary", "layer", "optimizer_name"), CASES)
def test_local_learning_is_the_loop_by_hand(boundary, layer, optimizer_name):
    """In float64 over many steps, and bitwise for the suffix when both start each step from the same prefix."""
    model = convnet().double()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=images(1)[0][0].double())
    by_hand, hand_optimizer = copy.deepcopy((model, optimizer))
    following, following_optimizer = copy.deepcopy((model, optimizer))
    pairs = [(x.double(), y) for x, y in images(8)]
    for batch in pairs[:3]:
        for network, its_optimizer in (
            (model, optimizer),
            (by_hand, hand_optimizer),
            (following, following_optimizer),
        ):
            train_step(network, its_optimizer, batch)
    local.move_to(boundary)
    for batch in pairs[3:]:
        train_step(model, optimizer, batch)
        hand_loop(by_hand, hand_optimizer, layer, batch, eta=0.01)
        hand_loop(following, following_optimizer, layer, batch, eta=0.01)
        for name in local.layers[:boundary]:
            torch.testing.assert_close(
                following.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight"), rtol=1e-12, atol=1e-14
            )
            following.get_parameter(f"{name}.weight").data.copy_(model.get_parameter(f"{name}.weight"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(by_hand.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    assert same(weights(model), weights(following))


@pytest.mark.parametrize("rule", [lowcal.Hebbian(), lowcal.Frozen()], ids=["hebbian", "frozen"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("optimizer_name", "order"), list(zip(OPTIMIZERS, ORDERS, strict=True)))
def test_no_prefix_parameter_moves_but_by_local_updates(optimizer_name, order, set_to_none, rule):
    model = convnet()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=rule, example_inputs=images(1)[0][0])

    def zero_grad():
        optimizer.zero_grad(set_to_none=set_to_none)

    for batch in images(3):  # momentum, and gradients left from the last step
        train_step(model, optimizer, batch, order=order, zero_grad=zero_grad)
    local.move_to(2)
    for batch in images(4, seed=5):
        before = weights(model)
        train_step(model, optimizer, batch, order=order, zero_grad=zero_grad)
        moved = {n for n in changed(before, model) if n.startswith(("conv1", "conv2", "norm1", "norm2"))}
        moved = {n for n in moved if n.rpartition(".")[2] in ("weight", "bias")}
        if rule == lowcal.Frozen():
            assert moved == set()
            continue
        assert moved == {"conv1.weight", "conv2.weight"}
        for name in moved:
            length = (model.get_parameter(name).detach() - before[name]).norm()
            assert float(length) == pytest.approx(0.01, rel=1e-4)
    prefix = [n for n, _ in model.named_parameters() if n.startswith(("conv1", "conv2", "norm1", "norm2"))]
    assert all(model.get_parameter(name).grad is None for name in prefix)
    assert not any(optimizer.state.get(model.get_parameter(name)) for name in prefix)  # stale momentum is gone
    assert all(optimizer.state[p] for n, p in model.named_parameters() if n not in prefix)


PREFIX = ("conv1", "norm1", "conv2", "norm2")  # at boundary 2


@dataclasses.dataclass(frozen=True)
class Logged(lowcal.Hebbian):
    """The same updates; `log` has each weight as it was before each, and after it."""

    log: list = dataclasses.field(default_factory=list, compare=False)

    def apply(self, weights, updates, step):
        before = [weight.clone() for weight in weights]
        skipped = super().apply(weights, updates, step)
        self.log.append((before, [weight.clone() for weight in weights]))
        return skipped


@pytest.mark.parametrize("rule", [Logged, lowcal.Frozen, lambda: lowcal.Refresh(every=10)])
@pytest.mark.parametrize(
    ("kind", "fused", "set_to_none"),
    [(torch.optim.SGD, False, True), (torch.optim.SGD, True, False), (torch.optim.AdamW, False, False)],
)
def test_local_layers_do_not_drift(kind, fused, set_to_none, rule):
    rule = rule()
    model = convnet()
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused, **momentum)
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=rule, example_inputs=images(1)[0][0])
    batches = images(4)

    def zero_grad():
        optimizer.zero_grad(set_to_none=set_to_none)

    def prefix():
        return {n: p.detach().clone() for n, p in model.named_parameters() if n.partition(".")[0] in PREFIX}

    for batch in batches:
        train_step(model, optimizer, batch, zero_grad=zero_grad)
    local.move_to(2)
    start = prefix()
    moved = {"conv1.weight", "conv2.weight"} if isinstance(rule, Logged) else set()
    for step in range(40):
        before = prefix()
        train_step(model, optimizer, batches[step % 4], zero_grad=zero_grad)
        if rule.opens and step % 10 == 0:
            assert all(not torch.equal(before[name], value) for name, value in prefix().items())
        else:
            assert {name for name, value in prefix().items() if not torch.equal(before[name], value)} == moved
    if isinstance(rule, Logged):
        assert len(rule.log) == 40
        for (_, after), (before, _) in itertools.pairwise(rule.log):
            assert same(after, before)  # nothing else touched them between two updates
        first, last = rule.log[0][0], rule.log[-1][1]
        assert same(first, [start["conv1.weight"], start["conv2.weight"]])
        assert same(last, [prefix()["conv1.weight"], prefix()["conv2.weight"]])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_updates_of_micro_batches_add_up(order, set_to_none):
    model = mlp().double()
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=vectors(1)[0][0].double())
    local.move_to(2)
    for seed in range(3):
        micro = [(x.double(), y) for x, y in vectors(3, seed=seed)]
        before = weights(model)
        one = sum(weight_product(model.one, x, model.one(x)) for x, _ in micro)
        hidden = [model.one(x).relu() for x, _ in micro]
        two = sum(weight_product(model.two, h, model.two(h)) for h in hidden)
        train_step(
            model, optimizer, *micro, order=order, zero_grad=lambda: optimizer.zero_grad(set_to_none=set_to_none)
        )
        for name, update in (("one", one), ("two", two)):
            expected = local_step(before[f"{name}.weight"], update, 0.01)
            torch.testing.assert_close(getattr(model, name).weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_updates_of_two_forward_passes_with_one_backward_pass_add_up():
    model = mlp().double()
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=vectors(1)[0][0].double())
    local.move_to(1)
    for seed in range(2):
        (x, y), (x2, y2) = [(x.double(), y) for x, y in vectors(2, seed=seed)]
        update = weight_product(model.one, x, model.one(x)) + weight_product(model.one, x2, model.one(x2))
        expected = local_step(model.one.weight, update, 0.01)
        loss = nn.functional.cross_entropy(model(x), y) + nn.functional.cross_entropy(model(x2), y2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(model.one.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_clipping_counts_no_gradient_of_a_local_layer():
    model = mlp()
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=vectors(1)[0][0])
    train_step(model, optimizer, vectors(1)[0])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)  # what a loop leaves behind that zeroes before backward
    local.move_to(2)
    for inputs, labels in vectors(3):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        suffix = torch.cat([p.grad.flatten() for m in (model.three, model.four) for p in m.parameters()])
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert float(total) == pytest.approx(float(suffix.norm()), rel=1e-6)
        optimizer.step()


def test_a_gradient_that_awaits_its_step_when_the_boundary_moves_is_not_applied():
    model = mlp()
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=lowcal.Frozen(), example_inputs=vectors(1)[0][0])
    nn.functional.cross_entropy(model(vectors(1)[0][0]), vectors(1)[0][1]).backward()
    local.move_to(2)
    before = weights(model)
    optimizer.step()
    assert changed(before, model) == {f"{n}.{k}" for n in ("three", "four") for k in ("weight", "bias")}


@pytest.mark.parametrize("boundary", [1, 2, 3])
def test_checkpointing_over_the_boundary_does_not_double_an_update(boundary):
    """One of two micro-batches is checkpointed: twice its update would turn the sum of both."""
    states = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = mlp()
        optimizer = sgd(model)
        local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=vectors(1)[0][0])
        local.move_to(boundary)
        for seed in range(3):
            optimizer.zero_grad()
            for index, (inputs, labels) in enumerate(vectors(2, seed=seed)):
                if checkpointing and index == 0:
                    hidden = torch.utils.checkpoint.checkpoint(model[:-1], inputs, use_reentrant=False)
                    output = model[-1](hidden)
                else:
                    output = model(inputs)
                nn.functional.cross_entropy(output, labels).backward()
            optimizer.step()
        states.append(weights(model))
    assert same(*states)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "eval and no_grad"])
@pytest.mark.parametrize("where", ["before", "between", "after backward"])
def test_evaluation_never_changes_a_weight(mode, where):
    def evaluate(model, inputs):
        if "eval" in mode:
            model.eval()
        with torch.inference_mode(mode == "inference_mode"), torch.set_grad_enabled(mode == "eval"):
            model(inputs)
        model.train()

    states = []
    for evaluating in (False, True):
        torch.manual_seed(2)
        model = convnet(norm=False, inplace=False)
        optimizer = sgd(model)
        local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=images(1)[0][0])
        local.move_to(2)
        other = 10 * images(1, seed=9)[0][0]
        for inputs, labels in images(3):
            if evaluating and where == "before":
                evaluate(model, other)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            if evaluating and where == "between":
                evaluate(model, other)
            optimizer.zero_grad()
            loss.backward()
            if evaluating and where == "after backward":
                evaluate(model, other)
            optimizer.step()
        before = weights(model)
        evaluate(model, other)
        assert not changed(before, model)
        optimizer.zero_grad()
        optimizer.step()
        assert not {"conv1.weight", "conv2.weight"} & changed(before, model)
        states.append(before)
    assert same(*states)


def test_layers_left_out_of_some_steps_keep_exact():
    """Skipped layers add nothing to a sum over micro-batches either."""
    model = Optional().double()
    optimizer = sgd(model)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=vectors(1)[0][0].double())
    local.move_to(2)
    (x, y), (x2, y2) = [(x.double(), y) for x, y in vectors(2)]
    hidden = model.one(x).relu()
    expected = local_step(model.two.weight, weight_product(model.two, hidden, model.two(hidden)), 0.01)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    model.skip = True
    nn.functional.cross_entropy(model(x2), y2).backward()
    optimizer.step()
    torch.testing.assert_close(model.two.weight.detach(), expected, rtol=1e-10, atol=1e-12)
