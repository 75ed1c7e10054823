"""A run that is saved and resumed in new objects ends bitwise where the uninterrupted run ends."""

import io

import pytest
import torch

import lowcal

from .networks import convnet, images
from .support import OPTIMIZERS, same, train_epoch, train_step, weights

EPOCHS = 7
SCHEDULES = {
    "fixed": lowcal.Fixed({1: 1, 3: 2, 6: 3}),
    "norm-trend": lowcal.NormTrend(alpha=1.2, shift=1, interval=1),
    "quadratic": lowcal.Quadratic(3, 0.1),
    "readings": lowcal.NormTrend(1.2, 1, interval=2, spacing="prose", measure="step", average="run"),
}


def build(schedule="fixed", optimizer="sgd", *, example=True, **options):
    model = convnet()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    inputs = images(1)[0][0] if example else None
    options.setdefault("rule", lowcal.Hebbian(decay_every=2))
    local = lowcal.LoCal(
        model, optimizer, epochs=EPOCHS, schedule=SCHEDULES[schedule], example_inputs=inputs, **options
    )
    return model, optimizer, local


def states(parts):
    return [part.state_dict() for part in parts]


def stored(things):
    """Through a file, as plain values and tensors only."""
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def batches(epoch):
    return images(3, seed=100 + epoch)


def finish(parts, start):
    """Trains from epoch `start` to the end; the state of everything after each epoch, by epoch."""
    found = {}
    for epoch in range(start, EPOCHS):
        train_epoch(*parts, batches(epoch))
        found[epoch + 1] = stored(states(parts))
    return found


# Model, optimizer and controller in each order of loading that puts another one first or last.
@pytest.mark.parametrize(("order", "example"), [((0, 1, 2), True), ((2, 0, 1), False), ((1, 2, 0), False)])
def test_resumed_at_every_epoch_in_every_order_of_loading(order, example):
    torch.manual_seed(1)
    parts = build(example=example)
    initial = stored(states(parts))
    whole = {0: initial, **finish(parts, 0)}
    assert [dict(state[2])["boundary"] for state in whole.values()] == [0, 1, 1, 2, 2, 2, 3, 3]
    for epoch in range(EPOCHS):
        torch.manual_seed(50 + epoch)  # other initial weights
        resumed = build(example=example)
        for index in order:
            resumed[index].load_state_dict(whole[epoch][index])
        assert same(stored(states(resumed)), whole[epoch])
        assert same(finish(resumed, epoch), {e: s for e, s in whole.items() if e > epoch})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("norm-trend", {}),
        ("norm-trend", {"optimizer": "adam", "norm_stats": "running"}),
        ("quadratic", {"optimizer": "adamw", "rule": lowcal.Hebbian(every=4, scale="relative")}),
        ("quadratic", {"rule": lowcal.Frozen(), "supervision": None}),
        (
            "readings",
            {
                "rule": lowcal.Hebbian(decay_every=1, decay_from="switch"),
                "supervision": lowcal.LossTrend("kept"),
            },
        ),
    ],
    ids=str,
)
def test_resumed_at_every_epoch(name, options):
    torch.manual_seed(1)
    parts = build(name, **options)
    whole = finish(parts, 0)
    boundaries = [state[2]["boundary"] for state in whole.values()]
    assert len(set(boundaries)) >= 3, boundaries  # several moves, or the test says little
    for epoch in range(1, EPOCHS):
        resumed = build(name, example=epoch % 2 == 0, **options)
        for part, state in zip(resumed, whole[epoch], strict=True):
            part.load_state_dict(state)
        assert same(finish(resumed, epoch), {e: s for e, s in whole.items() if e > epoch})


@pytest.mark.parametrize(
    ("rule", "optimizer", "norm_stats"),
    [
        (lowcal.Hebbian(every=2), "sgd", "running"),
        (lowcal.Frozen(), "adam", "batch"),
        (lowcal.Refresh(every=2), "sgd", "batch"),
        (lowcal.Refresh(every=2), "adamw", "running"),
    ],
    ids=str,
)
def test_resumed_right_after_a_move(rule, optimizer, norm_stats):
    options = {"optimizer": optimizer, "rule": rule, "norm_stats": norm_stats}
    torch.manual_seed(1)
    parts = build(**options)
    for epoch in range(4):  # moves after the first and the third; one step more, so that the rule is between its steps
        train_epoch(*parts, batches(epoch))
    train_step(parts[0], parts[1], batches(9)[0])
    parts[2].move_to(3)
    again = build(**options)
    for part, state in zip(again, stored(states(parts)), strict=True):
        part.load_state_dict(state)
    assert again[2].boundary == 3
    for step, batch in enumerate(images(4, seed=7)):
        seen = [facts(*some) for some in (parts, again)]
        assert same(*seen)
        assert seen[0]["momentum"][0] is (rule.opens)  # the first layer's: kept for the steps in which it learns by it
        for some in (parts, again):
            train_step(some[0], some[1], batch)
        assert same(stored(states(parts)), stored(states(again))), step


def facts(model, optimizer, local):
    """What a move changes in network and optimizer, without a step being made."""
    normalises = {}
    handles = [
        module.register_forward_hook(lambda m, *_, name=name: normalises.update({name: m.training}))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(images(1)[0][0])
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    for handle in handles:
        handle.remove()
    return {
        "required": [p.requires_grad for p in model.parameters()],
        "momentum": [p in optimizer.state for p in model.parameters()],
        "normalises": normalises,
    }


@pytest.mark.parametrize("schedule", ["norm-trend", "readings"])
@pytest.mark.parametrize("steps", [1, 2])
def test_resumed_in_the_middle_of_an_epoch(steps, schedule):
    """The change of the transition layer counts from the epoch's start, not from where the run was resumed."""
    results = []
    for interrupted in (False, True):
        torch.manual_seed(1)
        parts = build(schedule, rule=lowcal.Hebbian(every=2))
        for epoch in range(EPOCHS):
            losses = []
            for index, batch in enumerate(batches(epoch)):
                if interrupted and index == steps:
                    saved = stored(states(parts))
                    parts = build(schedule, rule=lowcal.Hebbian(every=2))
                    for part, state in zip(parts, saved, strict=True):
                        part.load_state_dict(state)
                losses.append(train_step(parts[0], parts[1], batch))
            parts[2].end_epoch(torch.stack(losses).mean())
        results.append(stored(states(parts)))
    assert same(*results)


def test_the_state_is_a_copy():
    parts = build()
    train_epoch(*parts, batches(0))
    kept = parts[2].state_dict()
    saved = stored(kept)
    train_epoch(*parts, batches(1))
    assert same(stored(kept), saved)
    other = build()
    other[2].load_state_dict(kept)
    train_epoch(*other, batches(3))
    assert same(stored(kept), saved)


def test_the_state_before_any_forward_can_be_resumed():
    parts = build(example=False)
    saved = stored(states(parts))
    resumed = build(example=False)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert same(finish(parts, 0), finish(resumed, 0))


def test_loading_into_the_same_controller_again():
    parts = build()
    finish_epochs = finish(parts, 0)
    final = finish_epochs[EPOCHS]
    for part, state in zip(parts, final, strict=True):
        part.load_state_dict(state)
    assert same(stored(states(parts)), final)
    before = weights(parts[0])
    train_step(parts[0], parts[1], batches(0)[0])
    assert not same(before, weights(parts[0]))


def test_a_state_takes_the_place_of_a_step_that_was_broken_off():
    torch.manual_seed(1)
    parts = build()
    whole = finish(parts, 0)
    parts = build()
    for part, state in zip(parts, whole[4], strict=True):
        part.load_state_dict(state)
    parts[0](batches(9)[0][0])  # leaves local updates for a step that never comes
    for part, state in zip(parts, whole[4], strict=True):
        part.load_state_dict(state)
    assert same(finish(parts, 4), {epoch: state for epoch, state in whole.items() if epoch > 4})
