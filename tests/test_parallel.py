"""Two ranks over every move: alike to the bit, and like one process on the whole mini-batch."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowcal
from lowcal.parallel import Exchange

from .ranks import Collectives, data, network, on_two_ranks

MOVES = {1: 1, 2: 3}
EPOCHS, STEPS = 4, 3


def controller(model, rule):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return optimizer, lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=rule, schedule=lowcal.Fixed(MOVES))


def one_process(rule, micro=1):
    model = network()
    optimizer, local = controller(model, rule)
    for epoch in range(EPOCHS):
        loss_sum = 0.0
        for step in range(STEPS):
            x, y = data(100 * epoch + step)
            optimizer.zero_grad()
            for part in range(micro):
                loss = nn.functional.cross_entropy(model(x[part::micro]), y[part::micro]) / micro
                loss.backward()
                loss_sum += loss.item()
            optimizer.step()
        local.end_epoch(loss_sum / STEPS)
    return model, local


def one_rank(rank, cases):
    return [_train(rank, *case) for case in cases]


def _train(rank, rule, micro, sync, options):
    model = network()
    optimizer, local = controller(model, rule)
    parallel = lowcal.DistributedLoCal(model, local, **options)
    keys, foretold, counted = list(parallel.state_dict()), [], []
    for epoch in range(EPOCHS):
        loss_sum = 0.0
        with Collectives() as collectives:
            for step in range(STEPS):
                x, y = (part[rank::2] for part in data(100 * epoch + step))
                optimizer.zero_grad()
                for part in range(micro):
                    last = part == micro - 1
                    with torch.enable_grad() if last or sync else parallel.no_sync():
                        loss = nn.functional.cross_entropy(parallel(x[part::micro]), y[part::micro]) / micro
                        loss.backward()
                    loss_sum += loss.item()
                optimizer.step()
        foretold.append(parallel.bytes_per_step())
        counted.append(collectives.bytes["allreduce_"] / STEPS)
        # The ranks see different losses; they must still agree on sign and boundary.
        local.end_epoch(loss_sum / STEPS)
    assert list(parallel.state_dict()) == keys
    return {
        "model": model.state_dict(),
        "foretold": foretold,
        "counted": counted,
        "sign": local.sign,
        "boundary": local.boundary,
    }


CASES = [  # rule, micro-batches, whether each is summed, options of DDP
    (lowcal.Hebbian(lr=0.01), 1, True, {}),
    (lowcal.Hebbian(lr=0.01), 2, False, {}),
    (lowcal.Hebbian(lr=0.01), 2, True, {}),
    (lowcal.Hebbian(lr=0.01, every=2), 2, False, {"gradient_as_bucket_view": True}),
    (lowcal.Frozen(), 1, True, {}),
    (lowcal.Refresh(every=2), 1, True, {}),
    (lowcal.Refresh(every=2), 2, False, {}),
    (lowcal.Refresh(every=4), 1, True, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
    (lowcal.Refresh(every=4), 1, True, {"static_graph": True}),
]


@pytest.fixture(scope="module")
def ranks():
    return on_two_ranks(one_rank, CASES)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_ranks_are_alike_and_like_one_process(ranks, case):
    rule, micro, sync, _ = CASES[case]
    first, second = (results[case] for results in ranks)
    assert first["sign"] == second["sign"]
    assert first["boundary"] == second["boundary"] == 3
    alone, local = one_process(rule, micro)
    assert local.sign == first["sign"]
    for name, expected in alone.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], expected, rtol=1e-4, atol=1e-5)
    if rule.every == 1 and (micro == 1 or not sync):
        assert first["counted"] == second["counted"] == first["foretold"]


@pytest.fixture
def alone(tmp_path):
    gc.collect()
    gc.freeze()  # objects of earlier tests; each of DDP's rebuilds collects garbage
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    gc.unfreeze()


@pytest.mark.parametrize(
    ("rule", "micro", "gradient_share", "update_share"),
    [
        (lowcal.Frozen(), 1, 0, 0),
        (lowcal.Hebbian(), 1, 0, 1),
        (lowcal.Hebbian(every=4), 2, 0, 1 / 4),
        (lowcal.Refresh(every=2), 1, 1 / 2, 0),
        (lowcal.Refresh(every=4), 2, 1 / 4, 0),
    ],
    ids=str,
)
def test_bytes_handed_to_collectives_are_those_foretold(alone, rule, micro, gradient_share, update_share):
    model = network()
    optimizer, local = controller(model, rule)
    parallel = lowcal.DistributedLoCal(model, local)
    model(data(0)[0])  # shows the order of layers
    sizes = [sum(p.nbytes for p in module.parameters()) for module in model]
    weights = [module.weight.nbytes if isinstance(module, nn.Conv2d) else 0 for module in model]
    counts = []
    for boundary, modules in ((0, 0), (1, 2), (3, 8)):
        local.move_to(boundary)
        with Collectives() as collectives:
            for step in range(4):
                x, y = data(step)
                optimizer.zero_grad()
                for part in range(micro):
                    with torch.enable_grad() if part == micro - 1 else parallel.no_sync():
                        nn.functional.cross_entropy(parallel(x[part::micro]), y[part::micro]).backward()
                optimizer.step()
        counted = collectives.bytes["allreduce_"] / 4
        prefix = gradient_share * sum(sizes[:modules]) + update_share * sum(weights[:modules])
        assert counted == parallel.bytes_per_step() == sum(sizes[modules:]) + prefix
        counts.append(counted)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3
    alive = sum(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    assert alive == (2 if rule.opens else 1)  # those of earlier boundaries are gone


@pytest.mark.parametrize("rule", [lowcal.Hebbian(), lowcal.Refresh(every=2)], ids=str)
@pytest.mark.parametrize("options", ["none", "process_group"])
def test_local_layers_have_a_communicator_of_their_own(alone, monkeypatch, options, rule):
    """The order of their collectives among those of DDP may differ from rank to rank, so one of DDP's would not do."""
    given = {} if options == "none" else {"process_group": dist.group.WORLD}
    model = network()
    optimizer, local = controller(model, rule)
    parallel = lowcal.DistributedLoCal(model, local, **given)
    model(data(0)[0])  # shows the order of layers
    local.move_to(2)
    asked = []
    all_reduce = dist.all_reduce

    def log(tensor, group=None, **options):
        asked.append(group or dist.group.WORLD)
        return all_reduce(tensor, group=group, **options)

    monkeypatch.setattr(dist, "all_reduce", log)
    for step in range(2):
        optimizer.zero_grad()
        parallel(data(step)[0]).sum().backward()
        optimizer.step()
    local.end_epoch(1.0)
    gradients, *of_local_layers = [reducer.process_group for reducer in parallel._reducers()]
    assert bool(of_local_layers) is rule.opens
    of_local_layers += asked
    assert of_local_layers
    assert dist.group.WORLD not in of_local_layers
    assert gradients not in of_local_layers


def test_after_detach_all_gradients_are_reduced_again(alone):
    model = network()
    optimizer, local = controller(model, lowcal.Hebbian())
    parallel = lowcal.DistributedLoCal(model, local)
    model(data(0)[0])  # shows the order of layers
    local.move_to(2)
    parallel(data(0)[0]).sum().backward()
    local.detach()
    whole = sum(p.nbytes for p in model.parameters())
    assert parallel.bytes_per_step() == whole
    with Collectives() as collectives:
        parallel(data(0)[0]).sum().backward()
        optimizer.step()
    assert collectives.bytes["allreduce_"] == whole


@pytest.mark.parametrize("frozen", [None, "3"], ids=["all", "one frozen by the user"])
def test_sums_begin_when_the_last_local_layer_has_run(alone, monkeypatch, frozen):
    """So that they overlap with the rest of the pass. A layer's own hook comes before the one that logs its name."""
    model = network()
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    _, local = controller(model, lowcal.Hebbian())
    parallel = lowcal.DistributedLoCal(model, local)
    model(data(0)[0])  # shows the order of layers: 0, 3, 6, 9
    local.move_to(2)
    log = []
    start = Exchange.start
    monkeypatch.setattr(Exchange, "start", lambda *arguments: log.append("sum") or start(*arguments))
    for name in local.layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: log.append(name))
    parallel(data(0)[0])
    expected = ["0", "sum", "3", "6", "9"] if frozen is None else ["sum", "0", "3", "6", "9"]
    assert log == expected


def test_missing_layer_counts_as_zero(alone):
    exchange = Exchange()
    like = {0: torch.zeros(2, 2), 3: torch.zeros(4)}
    sums = exchange.start({3: torch.ones(4)}, like)
    exchange.wait()
    assert torch.equal(sums[0], torch.zeros(2, 2))
    assert torch.equal(sums[3], torch.ones(4))


def test_mistakes(alone):
    model = network()
    _, local = controller(model, lowcal.Frozen())
    with pytest.raises(lowcal.LowcalError, match="find_unused_parameters"):
        lowcal.DistributedLoCal(model, local, find_unused_parameters=True)
    with pytest.raises(lowcal.LowcalError, match="process_group"):
        lowcal.DistributedLoCal(model, local, device_mesh=object())
    with pytest.raises(lowcal.LowcalError, match="another model"):
        lowcal.DistributedLoCal(copy.deepcopy(model), local)


def test_no_process_group():
    model = network()
    _, local = controller(model, lowcal.Frozen())
    with pytest.raises(lowcal.LowcalError, match="init_process_group"):
        lowcal.DistributedLoCal(model, local)
