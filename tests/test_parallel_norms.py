"""Normalisation over all ranks: torch's SyncBatchNorm, which trains on GPUs alone, and ours, for CPUs too."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowcal
from lowcal.norms import synchronise

from .networks import Residual, convnet, images
from .ranks import on_two_ranks
from .support import same, sgd, train_step, weights

RULES = [lowcal.Hebbian(lr=0.01), lowcal.Frozen(), lowcal.Refresh(every=2)]
STEPS = 8


def synced(device="cpu"):
    """A network that normalises over all ranks: by torch's module on a GPU."""
    torch.manual_seed(3)
    model = convnet().to(device)
    if device == "cpu":
        synchronise(model)
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def train(rank, rule, norm_stats, device="cpu", ranks=2):
    """Weights and running statistics after some steps with two moves; rank None is one process with the whole batch."""
    dtype = torch.float32 if device == "cpu" else torch.float64  # which leaves no room for TF32
    model = synced(device).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    example = torch.zeros(1, 2, 6, 6, device=device, dtype=dtype)
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=rule, norm_stats=norm_stats, example_inputs=example)
    called = model if rank is None else lowcal.DistributedLoCal(model, local)
    for step, batch in enumerate(images(STEPS, size=8)):
        if step in (2, 5):
            local.move_to(1 if step == 2 else 2)
        x, y = (part.to(device) if rank is None else part[rank::ranks].to(device) for part in batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(called(x.to(dtype)), y).backward()
        optimizer.step()
    return {name: value.cpu() for name, value in model.state_dict().items()}


def is_like_one_process(results, rule, norm_stats, device="cpu"):
    alone = train(None, rule, norm_stats, device)
    for name, expected in alone.items():
        assert all(torch.equal(result[name], results[0][name]) for result in results), name
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-5)


CASES = [(RULES[0], "batch"), (RULES[2], "batch"), (RULES[0], "running")]


def train_all(rank):
    return [train(rank, *case) for case in CASES]


def test_two_ranks_that_normalise_together_are_like_one_process():
    for results, case in zip(zip(*on_two_ranks(train_all), strict=True), CASES, strict=True):
        is_like_one_process(results, *case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm over two ranks needs two GPUs")
@pytest.mark.parametrize("norm_stats", ["batch", "running"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sync_batch_norm_on_two_gpus(rule, norm_stats):
    is_like_one_process(on_two_ranks(train, rule, norm_stats, "cuda", cuda=True), rule, norm_stats, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sync_batch_norm_on_one_gpu(tmp_path, rule):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        results = [train(0, rule, "batch", "cuda", ranks=1)]
    finally:
        dist.destroy_process_group()
    is_like_one_process(results, rule, "batch", "cuda")


@pytest.mark.parametrize("network", [convnet, Residual])
def test_sync_batch_norm_follows_the_layer_that_batch_norm_follows(network):
    model = network()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    orders = [
        lowcal.LoCal(m, sgd(m), epochs=9, example_inputs=images(1)[0][0]).state_dict() for m in (model, converted)
    ]
    assert orders[0]["norms"]
    assert same(*orders)


@pytest.mark.parametrize(("rule", "norm_stats"), [(RULES[0], "running"), (RULES[2], "batch")], ids=str)
def test_in_one_process_sync_batch_norm_is_bitwise_batch_norm(rule, norm_stats):
    results = []
    for convert in (lambda model: model, nn.SyncBatchNorm.convert_sync_batchnorm):
        torch.manual_seed(3)
        model = convert(convnet())
        optimizer = sgd(model)
        options = {"rule": rule, "norm_stats": norm_stats, "example_inputs": images(1)[0][0]}
        local = lowcal.LoCal(model, optimizer, epochs=9, **options)
        for step, batch in enumerate(images(6)):
            train_step(model, optimizer, batch)
            if step == 2:
                local.move_to(2)
                before = weights(model)
        results.append(weights(model))
        still = {n for n, value in before.items() if "running" in n and torch.equal(value, results[-1][n])}
        prefix = {"norm1.running_mean", "norm1.running_var", "norm2.running_mean", "norm2.running_var"}
        assert still == (prefix if norm_stats == "running" else set())
    assert same(*results)


def test_a_stilled_sync_batch_norm_waits_for_no_rank(tmp_path):
    """Before the boundary, by its running statistics, it no longer asks for the other ranks (nor for a GPU)."""
    model = convnet()
    for name in ("norm1", "norm2"):
        model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(name)))
    optimizer = sgd(model)
    options = {"norm_stats": "running", "example_inputs": images(1)[0][0]}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        local = lowcal.LoCal(model, optimizer, epochs=9, **options)
        with pytest.raises(ValueError, match="GPU"):
            train_step(model, optimizer, images(1)[0])
        local.move_to(2)
        train_step(model, optimizer, images(1)[0])
    finally:
        dist.destroy_process_group()
