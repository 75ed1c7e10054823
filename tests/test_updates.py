"""What local layers do in a step, without a controller: when updates are made, summed over ranks, and applied."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lowcal import Frozen, Hebbian, LowcalError
from lowcal.rules import apply_updates, hebbian_update
from lowcal.updates import LocalUpdates

from .networks import mlp, vectors
from .support import changed, sgd, weights


class Ranks:
    """Another rank whose updates are `factor - 1` times this one's, and a log of when the sums begin."""

    def __init__(self, log, factor=3):
        self.open, self.log, self.factor = True, log, factor

    def start(self, updates, shapes):
        self.log.append("sum")
        return {index: updates.get(index, torch.zeros_like(like)) * self.factor for index, like in shapes.items()}

    def wait(self):
        pass

    def mean(self, *values):
        return list(values)


def local_updates(model, rule=Hebbian(), names=("one", "two"), step=0.1):  # noqa: B008
    updates = LocalUpdates(model, rule)
    updates.watch(list(model.parameters()))
    for index, name in enumerate(names):
        updates.add(index, name, model.get_submodule(name))
    updates.set_step(step)
    return updates


def watched(model, names):
    """Notes the inputs and outputs of layers, in the order in which they run."""
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, outputs, name=name: seen.update({name: (inputs[0].detach(), outputs.detach())})
        )
    return seen


@pytest.mark.parametrize("replayable", [False, True])
@pytest.mark.parametrize("ranks", [False, True])
def test_the_weights_move_by_the_rule_after_the_step(ranks, replayable):
    names = ("one", "two")
    model = mlp()
    optimizer = sgd(model)
    updates = local_updates(model, names=names, step=0.5)
    seen = watched(model, names)
    if ranks:
        updates.use_ranks(Ranks([]))
    if replayable:
        updates.make_replayable(torch.device("cpu"))
    updates.set_step(-0.25)
    before = weights(model)
    model(vectors(1)[0][0]).sum().backward()
    assert not changed(before, model)
    assert updates.apply(optimizer)
    expected = {name: before[f"{name}.weight"].clone() for name in names}
    moves = [hebbian_update(model.get_submodule(name), *seen[name]) * (3 if ranks else 1) for name in names]
    apply_updates(list(expected.values()), moves, -0.25)
    assert changed(before, model) == {"one.weight", "two.weight"}
    for name in names:
        assert torch.equal(model.get_submodule(name).weight, expected[name])
    before = weights(model)
    assert not updates.apply(optimizer)  # each update is applied once
    assert not changed(before, model)
    assert updates.skipped == 0


@pytest.mark.parametrize(
    ("left_out", "expected"), [(None, ["one", "sum", "two", "three"]), ("two", ["sum", "one", "two", "three"])]
)
def test_sums_begin_when_the_last_layer_that_learns_has_run(left_out, expected):
    """A layer's own hook comes before the one that logs its name here."""
    model = mlp()
    updates = local_updates(model, names=[name for name in ("one", "two") if name != left_out])
    log = []
    updates.use_ranks(Ranks(log))
    for name in ("one", "two", "three"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: log.append(name))
    updates.begin_forward()
    model(vectors(1)[0][0])
    updates.end_forward()
    assert log == expected


def test_a_layer_that_was_not_added_makes_no_update():
    model = mlp()
    updates = local_updates(model, names=("two",))
    assert updates.bytes_per_step() == 4 * model.two.weight.numel()
    before = weights(model)
    model(vectors(1)[0][0]).sum().backward()
    updates.apply(sgd(model))
    assert changed(before, model) == {"two.weight"}


def test_a_rule_that_collects_nothing_puts_no_hook_on_the_network():
    updates = local_updates(mlp(), Frozen())
    assert updates.handles == []
    assert updates.bytes_per_step() == 0


def test_updates_are_made_in_the_steps_that_are_due():
    model = mlp()
    updates = local_updates(model, Hebbian(every=3))
    assert updates.bytes_per_step() == 4 * (20 + 30) // 3
    moved = []
    for _ in range(7):
        before = weights(model)
        model(vectors(1)[0][0]).sum().backward()
        updates.count_step(updates.apply(sgd(model)))
        moved.append(bool(changed(before, model)))
    assert moved == [True, False, False, True, False, False, True]
    assert updates.epoch_counts == [7, 3, 3]
    assert not updates.is_idle


def test_counts_are_resumed_and_what_was_kept_is_forgotten():
    model = mlp()
    updates = local_updates(model, Hebbian(every=2))
    model(vectors(1)[0][0]).sum().backward()
    updates.resume(steps=5, skipped=7, epoch_counts=[3, 1, 0])
    assert updates.is_idle  # of three steps the one that was due applied nothing
    assert (updates.steps, updates.skipped, updates.is_due) == (5, 7, False)
    before = weights(model)
    updates.apply(sgd(model))
    assert not changed(before, model)


def test_a_layer_that_runs_twice_is_named():
    one = nn.Linear(4, 4)
    model = nn.Sequential(one, nn.ReLU(), one, nn.Linear(4, 3))
    updates = LocalUpdates(model, Hebbian())
    updates.watch(list(model.parameters()))
    updates.add(0, "0", one)
    with pytest.raises(LowcalError, match="layer '0' runs twice"):
        model(vectors(1)[0][0])


def test_its_hooks_do_not_keep_it_alive():
    model = mlp()
    gone = weakref.ref(local_updates(model))
    gc.collect()
    assert gone() is None
    model(vectors(1)[0][0])
