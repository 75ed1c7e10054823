"""Accelerate: the weights of a plain loop, exact resume, two processes, and mistakes."""

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="Accelerate is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

import lowcal
from lowcal.integrations.accelerate import prepare_local

from ..networks import images
from ..ranks import data
from ..ranks import network as split_network
from ..support import refused, same, weights
from ..world import apart
from .plain import EPOCHS, OPTIONS, network, plain

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def prepared(accelerator, net=None, **options):
    net = net or network()
    return prepare_local(accelerator, net, sgd(net), epochs=EPOCHS, **{**OPTIONS, **options})


def train(accelerator, model, optimizer, local, batches, *, clip=None, start=(0, 0, 0.0), stop=None):
    """The loop of Accelerate's guide, from a position; at `stop` returns the position there."""
    epoch, first, total = start
    model.train()
    while epoch < EPOCHS:
        for index, (x, y) in list(enumerate(batches))[first:]:
            if (epoch, index) == stop:
                return epoch, index, total
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        local.end_epoch(total / len(batches))
        epoch, first, total = epoch + 1, 0, 0.0
    return None


@pytest.mark.parametrize(
    ("options", "local_options", "clip", "reference"),
    [
        ({}, {}, None, {}),
        ({}, {"rule": lowcal.Refresh(every=2)}, None, {"rule": lowcal.Refresh(every=2)}),
        ({"gradient_accumulation_steps": 2}, {}, None, {"accumulate": 2}),
        ({"mixed_precision": "bf16"}, {}, 0.1, {"bf16": True, "clip": 0.1}),
    ],
    ids=["plain", "refresh", "accumulation", "bf16-clipping"],
)
def test_trains_as_a_plain_loop_does(options, local_options, clip, reference):
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer, local = prepared(accelerator, **local_options)
    train(accelerator, model, optimizer, local, images(4), clip=clip)
    net, own = plain(**reference)
    assert same(weights(accelerator.unwrap_model(model)), weights(net))
    assert local.history == own.history == ((1, 1), (3, 2))


def test_a_list_of_optimizers():
    net, accelerator = network(), Accelerator(cpu=True)
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (net[:-1].parameters(), net[-1].parameters())]
    model, both, local = prepare_local(
        accelerator, net, optimizers, epochs=2, schedule=lowcal.Fixed({0: 1}), example_inputs=images(1)[0][0]
    )
    assert model is net
    assert len(both) == 2
    assert local.boundary == 1


@pytest.mark.parametrize("stop", [(0, 2), (2, 0), (3, 1), (4, 0)])
def test_resumes_exactly_from_the_hosts_checkpoint(stop, tmp_path):
    accelerator, batches = Accelerator(cpu=True), images(4)
    parts = prepared(accelerator)
    position = train(accelerator, *parts, batches, stop=stop)
    accelerator.save_state(tmp_path)
    parts[2].detach()
    AcceleratorState._reset_state(reset_partial_state=True)
    again = Accelerator(cpu=True)
    parts = prepared(again)
    again.load_state(tmp_path)
    train(again, *parts, batches, start=position)
    assert same(weights(parts[0]), weights(plain()[0]))


def on_a_rank(folder, accumulate):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    model, optimizer, local = prepared(accelerator, split_network(), rule=lowcal.Hebbian(lr=0.01))
    batches = [(x[rank::2], y[rank::2]) for x, y in map(data, range(4))]
    position = train(accelerator, model, optimizer, local, batches, stop=(4, 0))
    accelerator.save_state(folder / "state")
    train(accelerator, model, optimizer, local, batches, start=position)
    torch.save([model.module.state_dict(), local.state_dict()["losses"]], folder / f"{rank}.pt")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(accumulate, tmp_path):
    assert apart(2, on_a_rank, tmp_path, accumulate) == [0, 0]
    (first, losses), (second, same_losses) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same([first, losses], [second, same_losses])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, local = prepared(accelerator, split_network(), rule=lowcal.Hebbian(lr=0.01))
    batches = [data(seed) for seed in range(4)]
    train(accelerator, model, optimizer, local, batches)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(local.state_dict()["losses"], rel=1e-4)
    local.detach()
    again = prepared(accelerator, split_network(), rule=lowcal.Hebbian(lr=0.01))
    accelerator._models[:], accelerator._optimizers[:] = accelerator._models[1:], accelerator._optimizers[1:]
    accelerator._custom_objects.pop(0)
    accelerator.load_state(tmp_path / "state")  # of two processes
    train(accelerator, *again, batches, start=(4, 0, 0.0))
    for name, value in again[0].state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


def test_mistakes(monkeypatch):
    accelerator, net = Accelerator(cpu=True), network()
    both = accelerator.prepare(net, sgd(net))
    with refused("prepared already", "instead of accelerator.prepare"):
        prepare_local(accelerator, *both, epochs=2)
    net = network()
    with refused("does not hold"):
        prepare_local(accelerator, net, sgd(network()), epochs=2)
    assert net not in accelerator._models
    local = lowcal.LoCal(net, sgd(net), epochs=2)
    with refused("another LoCal", local=local):
        prepare_local(accelerator, net, sgd(net), epochs=2)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
    with refused("FSDP", "DDP"):
        prepared(accelerator)
