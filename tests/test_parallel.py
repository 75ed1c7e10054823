"""Two ranks over every move: alike to the bit, and like one process on the whole mini-batch."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lowcal
from lowcal.parallel import Exchange

MOVES = {1: 1, 2: 3}
EPOCHS, STEPS, BATCH = 4, 3, 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def data(epoch, step):
    generator = torch.Generator().manual_seed(100 * epoch + step)
    x = torch.randn(BATCH, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 5, (BATCH,), generator=generator)


def controller(model, rule):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return optimizer, lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=rule, schedule=lowcal.Fixed(MOVES))


def one_process(rule, micro=1):
    model = network()
    optimizer, local = controller(model, rule)
    for epoch in range(EPOCHS):
        loss_sum = 0.0
        for step in range(STEPS):
            x, y = data(epoch, step)
            optimizer.zero_grad()
            for part in range(micro):
                loss = nn.functional.cross_entropy(model(x[part::micro]), y[part::micro]) / micro
                loss.backward()
                loss_sum += loss.item()
            optimizer.step()
        local.end_epoch(loss_sum / STEPS)
    return model, local


def worker(rank, world, port, rule, micro, sync, options, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = network()
    optimizer, local = controller(model, rule)
    parallel = lowcal.DistributedLoCal(model, local, **options)
    keys, bytes_per_step = list(parallel.state_dict()), []
    for epoch in range(EPOCHS):
        loss_sum = 0.0
        for step in range(STEPS):
            x, y = data(epoch, step)
            x, y = x[rank::world], y[rank::world]
            optimizer.zero_grad()
            for part in range(micro):
                last = part == micro - 1
                with torch.enable_grad() if last or sync else parallel.no_sync():
                    loss = nn.functional.cross_entropy(parallel(x[part::micro]), y[part::micro]) / micro
                    loss.backward()
                loss_sum += loss.item()
            optimizer.step()
        bytes_per_step.append(parallel.bytes_per_step())
        # The ranks see different losses; they must still agree on sign and boundary.
        local.end_epoch(loss_sum / STEPS)
    assert list(parallel.state_dict()) == keys
    torch.save(
        {"model": model.state_dict(), "bytes": bytes_per_step, "sign": local.sign, "boundary": local.boundary},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def spawn(tmp_path, rule, micro=1, sync=False, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, (2, port, rule, micro, sync, options, tmp_path), nprocs=2, start_method="fork")
    return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("rule", "micro", "sync", "options"),
    [
        (lowcal.Hebbian(lr=0.01), 1, True, {}),
        (lowcal.Hebbian(lr=0.01), 2, False, {}),
        (lowcal.Hebbian(lr=0.01), 2, True, {}),
        (lowcal.Hebbian(lr=0.01, every=2), 2, False, {"gradient_as_bucket_view": True}),
        (lowcal.Refresh(every=2), 1, True, {}),
        (lowcal.Refresh(every=2), 2, False, {}),
        (lowcal.Refresh(every=4), 1, True, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
        (lowcal.Refresh(every=4), 1, True, {"static_graph": True}),
    ],
    ids=str,
)
def test_two_ranks_are_alike_and_like_one_process(tmp_path, rule, micro, sync, options):
    first, second = spawn(tmp_path, rule, micro, sync, **options)
    assert first["sign"] == second["sign"]
    assert first["boundary"] == second["boundary"] == 3
    alone, local = one_process(rule, micro)
    assert local.sign == first["sign"]
    for name, expected in alone.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], expected, rtol=1e-4, atol=1e-5)


def test_bytes_per_step_fall_with_the_boundary(tmp_path):
    frozen, _ = spawn(tmp_path, lowcal.Frozen())
    alone, _ = one_process(lowcal.Frozen())
    torch.testing.assert_close(frozen["model"], dict(alone.state_dict()), rtol=1e-4, atol=1e-5)
    sizes = [sum(p.numel() for p in module.parameters()) * 4 for module in network()]
    whole = sum(sizes)
    assert frozen["bytes"] == [whole, whole - sum(sizes[:2]), whole - sum(sizes[:8]), whole - sum(sizes[:8])]


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
    with pytest.raises(lowcal.LowcalError, match="another model"):
        lowcal.DistributedLoCal(copy.deepcopy(model), local)


def test_no_process_group():
    model = network()
    _, local = controller(model, lowcal.Frozen())
    with pytest.raises(lowcal.LowcalError, match="init_process_group"):
        lowcal.DistributedLoCal(model, local)
