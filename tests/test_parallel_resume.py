"""Several ranks: a run taken up in new objects, and steps that mixed precision skips."""

import copy
import io

import pytest
import torch
from torch import nn

import lowcal

from .ranks import data, network, on_two_ranks
from .support import same, weights

EPOCHS, STEPS = 4, 3


def build(rule, fused=False):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, fused=fused)
    local = lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=rule, schedule=lowcal.Fixed({1: 1, 2: 3}))
    return model, optimizer, local


def resumed(parts, rule, wrap_first):
    """All anew, as after a restart; wrapped for data-parallel training before its state is loaded, or after."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    again = build(rule)
    parallel = lowcal.DistributedLoCal(again[0], again[2]) if wrap_first else None
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return again, parallel or lowcal.DistributedLoCal(again[0], again[2])


def train(rank, rule, interrupted):
    """What there is after each epoch's end; `interrupted` at each of them, moves included, and in between."""
    parts = build(rule)
    parallel = lowcal.DistributedLoCal(parts[0], parts[2])
    found = []
    for epoch in range(EPOCHS):
        losses = []
        for step in range(STEPS):
            x, y = (part[rank::2] for part in data(100 * epoch + step))
            parts[1].zero_grad()
            loss = nn.functional.cross_entropy(parallel(x), y)
            loss.backward()
            parts[1].step()
            losses.append(loss.item())
            if interrupted and step == epoch % STEPS:
                parts, parallel = resumed(parts, rule, wrap_first=epoch % 2 == 0)
        parts[2].end_epoch(sum(losses) / STEPS)
        if interrupted:
            parts, parallel = resumed(parts, rule, wrap_first=epoch % 2 == 1)
        found.append(
            {
                "states": copy.deepcopy([part.state_dict() for part in parts]),
                "required": [p.requires_grad for p in parts[0].parameters()],
                "bytes": parallel.bytes_per_step(),
            }
        )
    return found


RULES = [lowcal.Hebbian(every=2), lowcal.Frozen(), lowcal.Refresh(every=2)]


def both(rank):
    return [{"whole": train(rank, rule, False), "interrupted": train(rank, rule, True)} for rule in RULES]


@pytest.fixture(scope="module")
def ranks():
    return on_two_ranks(both)


@pytest.mark.parametrize("index", range(len(RULES)), ids=map(str, RULES))
def test_a_run_resumed_at_every_move_and_in_between_is_bitwise_the_uninterrupted_one(ranks, index):
    results = [rank[index] for rank in ranks]
    assert [epoch["states"][2]["boundary"] for epoch in results[0]["whole"]] == [1, 3, 3, 3]
    for result in results:
        assert same(result["interrupted"], result["whole"])
    assert same(results[0]["whole"][-1]["states"][0], results[1]["whole"][-1]["states"][0])


GOOD = [(3, False), (5, False), (6, False)]
MIXED = [(3, False), (4, True), (5, False), (7, True), (8, True), (6, False)]


def scaled(rank, plan, rule, fused, micro):
    """Weights after the steps of `plan`, pairs of (seed of the data, whether rank 1's last gradient is infinite)."""
    model, optimizer, local = build(rule, fused)
    model(data(0)[0])  # shows the order of layers
    local.move_to(2)
    parallel = lowcal.DistributedLoCal(model, local)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
    for seed, spoil in plan:
        x, y = (part[rank::2] for part in data(seed))
        optimizer.zero_grad()
        for part in range(micro):
            with torch.enable_grad() if part == micro - 1 else parallel.no_sync():
                loss = nn.functional.cross_entropy(parallel(x[part::micro]), y[part::micro])
                scaler.scale(loss * torch.inf if spoil and rank == 1 and part == micro - 1 else loss).backward()
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert same(before, weights(model)) is spoil
    return weights(model)


def skipping(rank, variants):
    return {
        str(variant): {name: scaled(rank, plan, *variant) for name, plan in (("good", GOOD), ("mixed", MIXED))}
        for variant in variants
    }


def test_a_step_that_one_rank_spoils_leaves_no_trace_on_any():
    variants = [(lowcal.Hebbian(), False, 2), (lowcal.Hebbian(), True, 1), (lowcal.Refresh(2), False, 1)]
    first, second = on_two_ranks(skipping, variants)
    assert len(first) == len(variants)
    for variant, found in first.items():
        assert same(found["mixed"], found["good"]), variant
        assert same(found["mixed"], second[variant]["mixed"]), variant
