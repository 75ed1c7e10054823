"""Layers that cannot become local are refused only where the boundary can reach them."""

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lowcal
from lowcal import LowcalError

from .networks import convnet, images, mlp, vectors
from .ranks import data as rank_data
from .ranks import network, on_two_ranks
from .support import changed, same, sgd, train_step, weights


def control(model, moves=None, optimizer=None, **options):
    return lowcal.LoCal(
        model, optimizer or sgd(model), epochs=9, schedule=lowcal.Fixed(moves or {1: 1}), supervision=None, **options
    )


# What is refused, and where


class SharedHead(nn.Module):
    """As a detector's head that runs on several scales."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.body(x)
        return self.head(x) + self.head(x * 0.5)


class TiedEmbedding(nn.Module):
    """As a language model's: the classifier's weight is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.two(self.one(self.embedding(x)).relu()).relu())


def spectral():
    model = mlp()
    nn.utils.spectral_norm(model.four)
    return model


def parametrized():
    model = mlp()
    nn.utils.parametrizations.spectral_norm(model.four)
    return model


BEHIND = {"shared head": (SharedHead, "head"), "old spectral_norm": (spectral, "four"), "new": (parametrized, "four")}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "example"), [(name, name != "new") for name in BEHIND])
def test_a_layer_behind_the_reach_of_the_boundary_is_no_reason_to_refuse(name, example):
    build, last = BEHIND[name]
    model = build()
    optimizer = sgd(model)
    local = control(model, {1: 2}, optimizer, example_inputs=vectors(1)[0][0] if example else None)
    for epoch in range(3):
        train_step(model, optimizer, vectors(1, seed=epoch)[0])
        local.end_epoch(1.0)
    assert local.boundary == 2
    assert f"'{last}'" in local.summary()
    local.move_to(3)  # up to the layer, which is the transition layer now
    train_step(model, optimizer, vectors(1)[0])
    local.end_epoch(1.0)
    if len(local.layers) > 4:
        local.move_to(4)


def test_such_a_layer_within_reach_is_refused():
    class More(SharedHead):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 3)

        def forward(self, x):
            return self.last(super().forward(x))

    model = More()
    optimizer = sgd(model)
    with pytest.raises(lowcal.LowcalError, match=r"'head' runs twice.*max_fraction"):
        control(model, {1: 5}, optimizer, example_inputs=vectors(1)[0][0])
    local = control(model, {1: 4}, optimizer, example_inputs=vectors(1)[0][0])
    with pytest.raises(lowcal.LowcalError, match="'head' runs twice"):
        local.move_to(5)
    assert local.boundary == 0


def test_an_embedding_that_shares_a_layers_weight_is_refused():
    """Its gradient would keep back-propagation going through all local layers."""
    model = TiedEmbedding()
    with pytest.raises(lowcal.LowcalError, match=r"'one' cannot become local: the weight of layer 'head' is also used"):
        control(model, example_inputs=torch.tensor([0, 1, 2]))
    untied = TiedEmbedding()
    untied.head.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    control(untied, example_inputs=torch.tensor([0, 1, 2])).move_to(1)
    untied(torch.tensor([0, 1])).sum().backward()
    assert untied.embedding.weight.grad is None


def test_a_reach_beyond_the_network_is_that_of_the_network():
    class Mine(lowcal.NormTrend):
        def reach(self, layers):
            return 10**6

    model = nn.Sequential(SharedHead(), nn.Linear(3, 3))
    with pytest.raises(lowcal.LowcalError, match=r"'0.head' runs twice"):
        lowcal.LoCal(model, sgd(model), epochs=9, schedule=Mine(), example_inputs=vectors(1)[0][0])


# The order of layers


class Dropped(nn.Module):
    """Five layers, of which training skips the middle ones at random."""

    def __init__(self, draw):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.draw = draw

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if not (self.training and self.draw()):
                x = x + block(x).relu()
        return self.last(x)


WHOLE = ("first", "blocks.0", "blocks.1", "blocks.2", "last")


@pytest.mark.parametrize(
    ("draw", "example"),
    [(lambda: True, False), (lambda: torch.rand(()) < 0.5, True), (lambda: random.random() < 0.5, True)],
)
def test_blocks_skipped_at_random_have_their_place(draw, example):
    torch.manual_seed(0)
    random.seed(0)
    model = Dropped(draw)
    optimizer = sgd(model)
    before = random.getstate()
    local = control(model, {1: 2, 2: 3}, optimizer, example_inputs=vectors(1)[0][0] if example else None)
    assert random.getstate() == before
    for epoch in range(4):
        for batch in vectors(4, seed=epoch):
            train_step(model, optimizer, batch)
        assert local.layers == WHOLE
        local.end_epoch(1.0)


def test_an_order_that_is_not_whole_is_not_used():
    """In passes that differ in evaluation too, the place of a layer cannot always be told."""

    class Chosen(Dropped):
        present: tuple = ()

        def forward(self, x):
            x = self.first(x)
            for index in self.present:
                x = self.blocks[index](x)
            return self.last(x)

    model = Chosen(None)
    control_ = control(model)
    model.present = (0,)
    model(vectors(1)[0][0])
    model.present = (1,)
    model(vectors(1)[0][0])  # meets a layer, and watches the next pass
    with pytest.raises(lowcal.LowcalError, match=r"place of layer 'blocks.1'.*left out 'blocks.0'"):
        model(vectors(1)[0][0])
    model.present = (0, 1)
    model(vectors(1)[0][0])
    assert control_.layers == ("first", "blocks.0", "blocks.1", "last")


def test_layers_wrapped_between_the_controller_and_the_first_pass():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = mlp()
    optimizer = sgd(model)
    local = control(model, {1: 2}, optimizer)
    model.two = Checkpointed(model.two)
    for epoch in range(3):
        train_step(model, optimizer, vectors(1, seed=epoch)[0])
        local.end_epoch(1.0)
    assert local.layers == ("one", "two.inner", "three", "four")
    before = weights(model)
    train_step(model, optimizer, vectors(1)[0])
    assert {"one.weight", "two.inner.weight"} <= changed(before, model)


def test_a_layer_replaced_after_the_optimizer_was_built():
    model = mlp()
    optimizer = sgd(model)
    local = control(model, {1: 2}, optimizer)
    model.one = nn.Linear(4, 5)
    with pytest.raises(lowcal.LowcalError, match="does not hold the weight of layer 'one'"):
        train_step(model, optimizer, vectors(1)[0])
    assert local.layers == ()


# The summary


def test_the_summary_says_what_learns_how():
    model = mlp()
    model.one.requires_grad_(False)
    optimizer = sgd(model)
    local = control(model, {1: 2}, optimizer)
    assert "not known yet" in local.summary()
    train_step(model, optimizer, vectors(1)[0])
    local.end_epoch(1.0)
    lines = local.summary().splitlines()
    assert lines[0] == "Sequential: boundary 2 of 4 layers after 1 of 9 epochs; the schedule can move it to 2"
    assert any(line.startswith("local, by Hebbian(") and line.endswith("one to two (2 layers)") for line in lines)
    assert "by the optimizer: three to four (2 layers)" in lines
    assert "local, but with a weight that you froze: one" in lines


# Several processes


def plainly_parallel(rank):
    return [_plainly_parallel(rank, rule) for rule in (lowcal.Hebbian(), lowcal.Frozen())]


def _plainly_parallel(rank, rule):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=rule, schedule=lowcal.Fixed({1: 1}), supervision=None)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    try:
        for epoch in range(3):
            inputs, labels = rank_data(epoch)
            train_step(parallel, optimizer, (inputs[rank::2], labels[rank::2]))
            local.end_epoch(1.0)
    except lowcal.LowcalError as error:
        return str(error)
    return model[0].weight.detach()


def test_ranks_whose_local_updates_nobody_sums_are_refused():
    results = on_two_ranks(plainly_parallel)
    for message, _ in results:
        assert message.startswith("2 processes train, and nothing sums their local updates")
        assert "DistributedLoCal(model, local)" in message
    assert torch.equal(results[0][1], results[1][1])  # frozen layers need no sums


def sharded(rank):
    from torch.distributed.fsdp import fully_shard

    dist.barrier()
    model = network()
    wrapped = DistributedDataParallel(network())
    messages = []
    for make in (lambda: fully_shard(model), lambda: wrapped):
        network_ = make()
        try:
            lowcal.LoCal(network_, torch.optim.SGD(network_.parameters(), lr=0.05), epochs=9)
        except lowcal.LowcalError as error:
            messages.append(str(error))
    late = network()
    local = lowcal.LoCal(late, torch.optim.SGD(late.parameters(), lr=0.05), epochs=9)
    fully_shard(late)
    try:
        late(rank_data(0)[0])
    except lowcal.LowcalError as error:
        messages.append(str(error))
    local.detach()
    return messages


def test_sharded_and_wrapped_networks_are_refused():
    for messages in on_two_ranks(sharded):
        assert len(messages) == 3
        assert "sharded" in messages[0]
        assert "wrapped in DistributedDataParallel" in messages[1]
        assert "sharded" in messages[2]


def test_layers_may_be_local_from_the_start():
    """As by `move_to` before the first step; a resumed controller starts there too."""
    ends = []
    for moves, first in (({0: 2, 2: 3}, 0), ({2: 3}, 2)):
        torch.manual_seed(0)
        model = convnet()
        optimizer = sgd(model)
        local = lowcal.LoCal(model, optimizer, epochs=4, schedule=lowcal.Fixed(moves), example_inputs=images(1)[0][0])
        local.move_to(first or local.boundary)
        assert local.boundary == 2
        for _ in range(3):
            for batch in images(3):
                train_step(model, optimizer, batch)
            local.end_epoch(1.0)
        ends.append((weights(model), local.history))
    assert same(*ends)
    assert ends[0][1] == ((0, 2), (2, 3))
    state = local.state_dict()
    again = lowcal.LoCal(
        fresh := convnet(), sgd(fresh), epochs=4, schedule=lowcal.Fixed({0: 2}), example_inputs=images(1)[0][0]
    )
    again.load_state_dict(state)
    assert again.history == local.history
    with pytest.raises(LowcalError, match=r"local layers from the start.*give example_inputs"):
        lowcal.LoCal(model := convnet(), sgd(model), epochs=4, schedule=lowcal.Fixed({0: 2}))
