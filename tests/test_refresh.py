"""Refresh: frozen layers that learn from their true gradients in each n-th step."""

import copy

import pytest
import torch
from torch import nn

import lowcal
from lowcal import LoCal, LowcalError, Refresh
from lowcal.method_settings import LocalSettings
from lowcal.methods import build_method

from .networks import convnet, images
from .support import OPTIMIZERS, changed, same, sgd, train_step, weights

LOCAL = ("conv1", "norm1", "conv2", "norm2")  # at boundary 2


def controlled(every, optimizer_name="sgd"):
    model = convnet()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    local = LoCal(model, optimizer, epochs=9, rule=Refresh(every), example_inputs=images(1)[0][0])
    return model, optimizer, local


@pytest.mark.parametrize(
    ("every", "optimizer_name", "set_to_none"),
    [(2, "sgd", True), (3, "sgd", False), (3, "adam", True), (3, "adamw", False)],
)
def test_it_is_bitwise_the_loop_by_hand(every, optimizer_name, set_to_none):
    model, optimizer, local = controlled(every, optimizer_name)
    twin = copy.deepcopy(model)
    by_hand = OPTIMIZERS[optimizer_name](twin.parameters())
    batches = images(9)
    for batch in batches[:2]:  # so that there is momentum when the boundary moves
        train_step(model, optimizer, batch)
        train_step(twin, by_hand, batch)
    local.move_to(2)
    prefix = [p for name, p in twin.named_parameters() if name.startswith(LOCAL)]
    for step, batch in enumerate(batches[2:]):
        train_step(model, optimizer, batch, zero_grad=lambda: optimizer.zero_grad(set_to_none=set_to_none))
        by_hand.zero_grad()
        nn.functional.cross_entropy(twin(batch[0]), batch[1]).backward()
        if step % every:
            for parameter in prefix:
                parameter.grad = None
        by_hand.step()
        assert same(weights(model), weights(twin)), step


def test_between_its_steps_nothing_of_the_prefix_is_kept_or_moves():
    model, optimizer, local = controlled(3)
    local.move_to(2)
    saved: list[int] = []
    for step, batch in enumerate(images(6)):
        before = weights(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, step=step: saved.append(step) or t, lambda t: t):
            model.conv2(model.norm1(model.conv1(batch[0])))
        train_step(model, optimizer, batch)
        moved = {name.partition(".")[0] for name in changed(before, model) if "weight" in name}
        assert (step in saved) == (step % 3 == 0)
        assert (moved & set(LOCAL) != set()) == (step % 3 == 0)


def test_resumed_at_any_step_it_goes_on_bitwise():
    batches = images(8)
    model, optimizer, local = controlled(3)
    local.move_to(2)
    saved = []
    for batch in batches:
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), local.state_dict())))
        train_step(model, optimizer, batch)
    for step, (model_state, optimizer_state, local_state) in enumerate(saved):
        again, other, resumed = controlled(3)
        resumed.load_state_dict(local_state)
        again.load_state_dict(model_state)
        other.load_state_dict(optimizer_state)
        for batch in batches[step:]:
            train_step(again, other, batch)
        assert same(weights(model), weights(again)), step


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_a_scaler_skips_moves_nothing_and_counts_only_with_a_fused_optimizer(fused):
    model = convnet(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused)
    local = LoCal(model, optimizer, epochs=9, rule=Refresh(3), example_inputs=images(1)[0][0])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
    local.move_to(2)
    spoilt, opened = {2, 4}, []
    for step, batch in enumerate(images(9)):
        before = weights(model)
        train_step(model, optimizer, batch, scaler=scaler, spoil=step in spoilt)
        moved = {name.partition(".")[0] for name in changed(before, model)}
        assert (moved == set()) == (step in spoilt)
        if moved & set(LOCAL):
            assert moved >= {"conv1", "conv2"}
            opened.append(step)
    # A fused optimizer skips on the device, where the host does not look: its step is one of the three all the same.
    assert opened == ([0, 3, 6] if fused else [0, 5, 8])


def test_detach_in_any_step_gives_the_gradients_back():
    for steps in range(3):
        model, optimizer, local = controlled(2)
        local.move_to(2)
        for batch in images(3)[:steps]:
            train_step(model, optimizer, batch)
        local.detach()
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_as_a_method_it_takes_its_setting_and_counts_its_whole_period():
    model = convnet()
    method = build_method(
        "refresh", model, sgd(model), LocalSettings(refresh_every=5), epochs=4, example_inputs=images(1)[0][0]
    )
    assert method.period == 5
    assert method._local.rule == Refresh(5)


@pytest.mark.parametrize("every", [0, 1, -1, 2.0, "4"])
def test_mistakes(every):
    with pytest.raises(LowcalError, match="Refresh: every is"):
        lowcal.Refresh(every)


def test_what_is_no_rule_is_refused():
    model = convnet()
    with pytest.raises(LowcalError, match="rule"):
        LoCal(model, sgd(model), epochs=3, rule="hebbian")
