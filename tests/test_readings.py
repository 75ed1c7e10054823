"""What the paper leaves open, in training: norms of steps, eta by a layer's own switch, and readings of one's own."""

import copy
import dataclasses
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import nn

import lowcal
from lowcal import Fixed, Hebbian, LoCal, LowcalError, NormTrend
from lowcal.rules import apply_updates, hebbian_update
from lowcal.schedule import Schedule

from .networks import convnet, images, mlp, vectors
from .ranks import data, network, on_two_ranks
from .support import OPTIMIZERS, changed, refused, same, sgd, train_epoch, train_step, weights

EXAMPLE = vectors(1)[0][0]
NEVER = NormTrend(alpha=0.0, shift=1, interval=1, measure="step")  # measures, and does not move


def batches(epoch, count=3, dtype=torch.float64):
    return [(x.to(dtype), y) for x, y in vectors(count, seed=10 + epoch)]


# ||dW_E|| as the mean norm of steps


@pytest.mark.parametrize(("kind", "example"), [("sgd", True), ("adam", False), ("adamw", True)])
def test_the_mean_norm_of_steps_is_that_of_the_loop_by_hand(kind, example):
    model = mlp().double()
    optimizer = OPTIMIZERS[kind](model.parameters())
    local = LoCal(model, optimizer, epochs=9, schedule=NEVER, example_inputs=EXAMPLE.double() if example else None)
    for boundary, layer in enumerate((model.one, model.two, model.three)):
        norms, start = [], layer.weight.detach().clone()
        for batch in batches(boundary):
            before = layer.weight.detach().clone()
            train_step(model, optimizer, batch)
            norms.append(float((layer.weight.detach() - before).norm()))
        change = float((layer.weight.detach() - start).norm())
        local.end_epoch(1.0)
        assert local.change == pytest.approx(sum(norms) / 3, rel=1e-12)
        assert local.change != pytest.approx(change, rel=1e-3)
        local.move_to(boundary + 1)
    local.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_move_by_hand_begins_a_new_mean():
    model = mlp().double()
    local = LoCal(model, sgd(model), epochs=9, schedule=NEVER, example_inputs=EXAMPLE.double())
    first, second = batches(0, 2)
    train_step(model, local.optimizer, first)
    local.move_to(1)
    before = model.two.weight.detach().clone()
    train_step(model, local.optimizer, second)
    local.end_epoch(1.0)
    assert local.change == pytest.approx(float((model.two.weight.detach() - before).norm()), rel=1e-12)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_mixed_precision_skips_does_not_count(fused):
    def change(plan):
        torch.manual_seed(2)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        local = LoCal(model, optimizer, epochs=9, schedule=NEVER, example_inputs=EXAMPLE)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
        for seed, spoil in plan:
            train_step(model, optimizer, vectors(1, seed=seed)[0], scaler=scaler, spoil=spoil)
        local.end_epoch(1.0)
        return local.change

    assert change([(3, False), (4, True), (5, False), (7, True)]) == change([(3, False), (5, False)]) > 0


def step_norm_on_a_rank(rank):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    local = LoCal(model, optimizer, epochs=4, schedule=NEVER)
    parallel = lowcal.DistributedLoCal(model, local)
    return _changes(parallel, local, lambda step: [part[rank::2] for part in data(step)])


def _changes(called, local, batch):
    changes = []
    for epoch in range(2):
        for step in range(3):
            x, y = batch(10 * epoch + step)
            local.optimizer.zero_grad()
            nn.functional.cross_entropy(called(x), y).backward()
            local.optimizer.step()
        local.end_epoch(1.0)
        changes.append(local.change)
        local.move_to(epoch + 1)
    return changes


def test_two_ranks_measure_the_norm_of_one_process():
    first, second = on_two_ranks(step_norm_on_a_rank)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    assert first == second
    assert first == pytest.approx(_changes(model, LoCal(model, optimizer, epochs=4, schedule=NEVER), data), rel=1e-4)


# eta by a layer's own switch


@pytest.mark.parametrize(("frozen", "replayable"), [(None, True), ("one", False)])
def test_each_layer_decays_from_its_own_switch(frozen, replayable):
    """Layer one is local from epoch 1 on, layers two and three from epoch 3 on; eta halves every 2 epochs of theirs."""
    model = mlp().double()
    if frozen:
        model.one.weight.requires_grad_(False)
    rule = Hebbian(lr=0.01, decay=0.5, decay_every=2, decay_from="switch")
    schedule = Fixed({1: 1, 3: 3})
    local = LoCal(model, sgd(model), epochs=9, rule=rule, schedule=schedule, example_inputs=EXAMPLE.double())
    expected = {"one": [0, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025], "two": [0, 0, 0, 0.01, 0.01, 0.005, 0.005]}
    expected["three"] = expected["two"]
    newest = [0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005]
    losses = [1.0, 0.9, 0.8, 0.9, 0.7, 0.8, 0.6]  # signs - in epochs 4 and 6
    for epoch in range(7):
        if replayable:
            local._local_layers.make_replayable(torch.device("cpu"))
        assert local.lr == newest[epoch]
        for batch in batches(epoch, 2):
            before = {name: model.get_submodule(name).weight.detach().clone() for name in expected}
            updates = seen_updates(model, batch)
            train_step(model, local.optimizer, batch)
            for index, name in enumerate(expected):
                if name == frozen or index >= local.boundary:
                    continue
                step = model.get_submodule(name).weight.detach() - before[name]
                direction = updates[name] / updates[name].norm()
                sign = -1 if epoch in (4, 6) else 1
                torch.testing.assert_close(step, sign * expected[name][epoch] * direction, rtol=1e-9, atol=1e-12)
        local.end_epoch(losses[epoch])
        assert local.sign == (-1 if epoch + 1 in (4, 6) else 1)


def seen_updates(model, batch):
    """dW of each layer for the coming step, by name, from a copy of the network without hooks."""
    copied, found = copy.deepcopy(model), {}
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, inputs, outputs, name=name: found.update({name: hebbian_update(m, inputs[0], outputs)})
            )
    with torch.no_grad():
        copied(batch[0])
    return found


def test_one_step_for_all_and_the_same_step_for_each_are_bitwise_alike():
    def trained(decay_from):
        torch.manual_seed(0)
        model = convnet()
        rule = Hebbian(lr=0.037, decay=1.0, decay_from=decay_from)
        local = LoCal(model, sgd(model), epochs=9, rule=rule, schedule=Fixed({1: 1, 2: 3}))
        for epoch in range(4):
            train_epoch(model, local.optimizer, local, images(2, seed=epoch))
        return weights(model)

    assert same(trained("start"), trained("switch"))


def test_a_new_layer_has_its_own_step_right_after_a_move_by_hand():
    model = mlp().double()
    rule = Hebbian(lr=0.01, decay=0.1, decay_every=1, decay_from="switch")
    local = LoCal(model, sgd(model), epochs=9, rule=rule, schedule=Fixed({1: 1}), example_inputs=EXAMPLE.double())
    for epoch in range(3):
        train_epoch(model, local.optimizer, local, batches(epoch))
    local.move_to(2)
    before = weights(model)
    train_step(model, local.optimizer, batches(9)[0])
    moved = [float((weights(model)[f"{name}.weight"] - before[f"{name}.weight"]).norm()) for name in ("one", "two")]
    assert moved == pytest.approx([0.0001, 0.01], rel=1e-9)  # local since epoch 1, and since now (epoch 3)


@pytest.mark.parametrize("value", ["epoch", None])
def test_another_start_of_the_decay_is_refused(value):
    with pytest.raises(LowcalError, match=f"decay_from is {value!r}; give 'start' or 'switch'"):
        Hebbian(decay_from=value)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)])
def test_apply_updates_takes_a_step_for_each_layer(dtypes):
    weight = [torch.randn(3, 4, dtype=dtypes[index % len(dtypes)]) for index in range(4)]
    updates = [torch.randn_like(w) for w in weight]
    steps = [0.5, -0.25, 0.0, 2.0]
    expected = [w + s * u / u.norm() for w, u, s in zip(weight, updates, steps, strict=True)]
    apply_updates(weight, updates, torch.tensor(steps, dtype=torch.float64))
    for found, wanted in zip(weight, expected, strict=True):
        torch.testing.assert_close(found, wanted)


# Readings of one's own: what a schedule, a rule or a supervision of the user's must see to express each


def path(schedule, model=None, epochs=8, **options):
    torch.manual_seed(0)
    model = model or convnet()
    local = LoCal(model, sgd(model), epochs=epochs, schedule=schedule, **options)
    boundaries = []
    for epoch in range(epochs):
        train_epoch(model, local.optimizer, local, images(2, seed=epoch))
        boundaries.append(local.boundary)
    return boundaries, weights(model), local


@dataclasses.dataclass(frozen=True)
class Own(Schedule):
    """A move by one layer when the last norm is under `factor` times the mean of all of the run before it."""

    factor: float = 1.0
    measure: ClassVar[str] = "step"
    remembers: ClassVar[bool] = True
    seen: list = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, progress):
        self.seen.append(progress)
        norms = [norm for _, norm in progress.earlier] + list(progress.changes)
        is_lower = len(norms) > 1 and norms[-1] < self.factor * sum(norms[:-1]) / len(norms[:-1])
        return progress.boundary + (is_lower and progress.boundary < progress.layers - 1)


def test_a_schedule_of_ones_own_sees_steps_and_earlier_layers():
    schedule = Own()
    boundaries, _, local = path(schedule)
    assert len(set(boundaries)) >= 3
    for progress, (before, after) in zip(schedule.seen, pairwise([0, *boundaries]), strict=True):
        assert progress.boundary == before
        assert [boundary for boundary, _ in progress.earlier] == [
            b for b in [0, *boundaries][: progress.epoch - 1] if b < before
        ]
        assert len(progress.earlier) + len(progress.changes) == progress.epoch
        assert after >= before
    listed = [norm for _, norm in schedule.seen[-1].earlier] + list(schedule.seen[-1].changes)
    assert listed == [progress.changes[-1] for progress in schedule.seen]
    assert listed[-1] == local.change


def test_a_schedule_that_asks_for_nothing_is_told_nothing():
    seen = []

    class Plain:
        """Neither `measure` nor `remembers`, as schedules were before there were these."""

        def __call__(self, progress):
            seen.append(progress)
            return 1

        def check(self, layers, epochs):
            pass

    path(Plain(), epochs=3)
    assert [progress.earlier for progress in seen] == [None] * 3


def test_a_measure_that_there_is_not_is_refused():
    class Wrong(Schedule):
        measure = "batch"

        def __call__(self, progress):
            return 0

    model = mlp()
    optimizer = sgd(model)
    with refused("measure is 'batch'", model=model, optimizer=optimizer):
        LoCal(model, optimizer, epochs=9, schedule=Wrong())


def test_a_rule_of_ones_own_may_count_from_the_switch():
    class Mine:
        """Steps of 0.1 / (epochs since the layer became local + 1), each weight's own."""

        collects, opens, every, decay_from = True, False, 1, "switch"

        def update(self, module, inputs, outputs):
            return hebbian_update(module, inputs, outputs)

        def step_size(self, epoch):
            return 0.1 / (epoch + 1)

        def apply(self, weights, updates, step):
            steps.append(step.tolist())
            return apply_updates(weights, updates, step)

    steps = []
    _, _, local = path(Fixed({1: 1, 2: 3}), epochs=4, rule=Mine(), supervision=None)
    assert steps[::2] == [[0.1], [0.1 / 2, 0.1, 0.1], [0.1 / 3, 0.1 / 2, 0.1 / 2]]
    assert local.lr == 0.1 / 3


# Saved states


def state_of(schedule, epochs=3):
    model = mlp()
    local = LoCal(model, sgd(model), epochs=9, schedule=schedule, example_inputs=EXAMPLE)
    for epoch in range(epochs):
        train_epoch(model, local.optimizer, local, vectors(2, seed=epoch))
    return local.state_dict()


MOVING = {"alpha": 9.0, "shift": 1, "interval": 1}
OLD = {"format", "layers", "followers", "norms", "epoch", "boundary", "history", "sign", "change", "losses", "changes",
       "steps", "skipped", "start", "epoch_counts", "limits",
}  # fmt: skip


def test_a_state_has_an_entry_more_only_where_a_reading_needs_it():
    assert set(state_of(NormTrend(**MOVING, spacing="prose", align="block"))) == OLD
    assert set(state_of(NormTrend(**MOVING, measure="step"))) == OLD | {"step_norms"}
    state = state_of(NormTrend(**MOVING, average="run"))
    assert set(state) == OLD | {"earlier"}
    assert [boundary for boundary, _ in state["earlier"]] == [0, 0]
    assert state["boundary"] == 1


@pytest.mark.parametrize(
    ("saved", "loading", "answer"),
    [
        ({}, {"measure": "step"}, "measured by epoch, and this schedule measures by step"),
        ({"measure": "step"}, {}, "measured by step, and this schedule measures by epoch"),
        ({}, {"average": "run"}, "lacks the norms of earlier transition layers"),
    ],
)
def test_a_state_of_other_norms_is_refused(saved, loading, answer):
    state = state_of(NormTrend(**MOVING, **saved))
    model = mlp()
    optimizer = sgd(model)
    local = LoCal(model, optimizer, epochs=9, schedule=NormTrend(**MOVING, **loading), example_inputs=EXAMPLE)
    with refused(answer, model=model, optimizer=optimizer, local=local):
        local.load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [{"step_norms": [1.0]}, {"step_norms": ["a", 1.0]}, {"step_norms": [-1.0, 2.0]}, {"step_norms": None},
     {"earlier": 3}, {"earlier": [1.0]}, {"earlier": [[0, "low"]]}, {"earlier": [[-1, 0.5]]}],
    ids=str,
)  # fmt: skip
def test_damaged_entries_are_refused(damage):
    schedule = NormTrend(**MOVING, average="run", measure="step")
    state = state_of(schedule)
    model = mlp()
    optimizer = sgd(model)
    local = LoCal(model, optimizer, epochs=9, schedule=schedule, example_inputs=EXAMPLE)
    with refused("damaged", model=model, optimizer=optimizer, local=local):
        local.load_state_dict({**state, **damage})
    before = weights(model)
    local.load_state_dict(state)
    assert local.boundary == 1
    assert not changed(before, model)
