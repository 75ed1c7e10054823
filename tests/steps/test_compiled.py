"""The compiled step. Most tests use a backend that runs the traced graph's own kernels, so equality is bitwise."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import lowcal
from lowcal import LowcalError
from lowcal.methods import METHODS, build_method
from lowcal.models import BasicBlock, build_model
from lowcal.steps import compiled
from lowcal.steps.compiled import CompiledStep, find_blocks
from lowcal.steps.modes import build_step
from lowcal.steps.step import EagerStep, StepOptions

from ..networks import images
from ..support import same, weights
from ..training.runs import make_run, network, outcome, run_on, settings, state

CPU = torch.device("cpu")
OPTIONS = StepOptions(CPU)


@pytest.fixture
def counter(monkeypatch):
    """Counts the graphs compiled in a test; none is left from another."""
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled, "BACKEND", backend)
    counters.clear()
    yield backend
    assert not counters["graph_break"]


def chain(count):
    """A network of `count` layers in alike blocks, and a classifier."""
    blocks = [BasicBlock(2, 2, stride=1) for _ in range(count // 2)]
    return nn.Sequential(
        OrderedDict(
            blocks=nn.Sequential(*blocks), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(2, 3)
        )
    )


def attached(model, name="local", optimizer=None, **values):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    example = images(1)[0][0][:1]
    return optimizer, build_method(name, model, optimizer, settings(**values), epochs=99, example_inputs=example)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_bitwise_the_eager_one(tmp_path, counter, method):
    """Thirty steps with two moves, or channels removed, or blocks dropped; the smaller last batches are in it."""
    epochs, local = 6, settings(every=2, refresh_every=3)
    runs = [
        run_on(make_run(tmp_path / step, method, epochs=epochs, local=local, step=step, fused=True))
        for step in ("eager", "compiled")
    ]
    assert same(*map(outcome, runs))
    assert counter.frame_count > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_and_guard(tmp_path, counter, precision):
    options = {"precision": precision, "max_skips": 2, "fused": True, "epochs": 4}
    runs = [run_on(make_run(tmp_path / step, step=step, **options)) for step in ("eager", "compiled")]
    assert same(*map(outcome, runs))


def test_running_statistics_of_the_prefix(tmp_path, counter):
    local = settings(norm_stats="running")
    runs = [run_on(make_run(tmp_path / step, local=local, step=step, epochs=4)) for step in ("eager", "compiled")]
    assert same(*map(outcome, runs))


def test_twelve_moves_compile_few_graphs(counter):
    model = chain(16)
    optimizer, method = attached(model)
    plain = copy.deepcopy(model)
    plain_optimizer, plain_method = attached(plain)
    batches, compiled_graphs = images(3), []
    for boundary in range(13):
        method.move_to(boundary)
        plain_method.move_to(boundary)
        step = build_step("compiled", model, (optimizer,), method, OPTIONS)
        plain_step = EagerStep(plain, (plain_optimizer,), plain_method, OPTIONS)
        for batch in batches:
            assert torch.equal(step(*batch), plain_step(*batch))
        compiled_graphs.append(counter.frame_count)
    assert same(weights(model), weights(plain))
    # A block of two layers learns whole (its input needs a gradient or not), in part, or locally: 4, and no more.
    assert compiled_graphs[3:] == [compiled_graphs[3]] * 10
    assert compiled_graphs[-1] == 4


def test_steps_of_several_kinds_have_a_graph_each(counter):
    model = chain(4)
    optimizer, method = attached(model, every=3)
    method.move_to(2)
    step = build_step("compiled", model, (optimizer,), method, OPTIONS)
    for batch in images(7):
        step(*batch)
    assert counter.frame_count == 3  # the local block with and without its updates, and the one that learns


def test_another_network_of_the_same_kind_compiles_nothing(counter):
    for count in (1, 0):
        model = chain(4)
        optimizer, method = attached(model, "sgd")
        before = counter.frame_count
        build_step("compiled", model, (optimizer,), method, OPTIONS)(*images(1)[0])
        assert bool(counter.frame_count - before) is bool(count)


def test_a_frozen_block_s_code_is_not_taken_for_a_local_one(counter):
    """They differ in a hook alone, which compiled code does not look for."""
    batch = images(1)[0]
    for name in ("freeze", "local"):
        model = chain(4)
        optimizer, method = attached(model, name)
        method.move_to(2)
        before = model.blocks[0].conv1.weight.detach().clone()
        build_step("compiled", model, (optimizer,), method, OPTIONS)(*batch)
        assert torch.equal(model.blocks[0].conv1.weight, before) is (name == "freeze")


def test_a_smaller_batch_runs_as_it_is(counter):
    model = chain(4)
    optimizer, method = attached(model, "sgd")
    step = build_step("compiled", model, (optimizer,), method, replace(OPTIONS, batch=7))
    step(*images(1)[0])
    assert counter.frame_count == 0
    step(*images(1, size=7)[0])
    assert counter.frame_count == 2


def test_the_network_stays_what_it_is(counter):
    model = chain(4)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    optimizer, method = attached(model)
    method.move_to(2)
    step = build_step("compiled", model, (optimizer,), method, OPTIONS)
    step(*images(1)[0])
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    count = counter.frame_count
    twin = copy.deepcopy(model)
    inputs = images(1)[0][0]
    model.eval(), twin.eval()
    assert torch.equal(model(inputs), twin(inputs))
    twin.train()(inputs.double().float().expand(5, -1, -1, -1)).sum().backward()
    assert counter.frame_count == count  # neither evaluation nor a copy runs compiled code


def test_a_hook_that_comes_late_is_an_error(counter):
    model = chain(4)
    optimizer, method = attached(model)
    step = build_step("compiled", model, (optimizer,), method, OPTIONS)
    step(*images(1)[0])
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)  # elsewhere: no matter
    step(*images(1)[0])
    handle = model.blocks[1].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(LowcalError, match=r"hooks on 'blocks\.1\.norm2' have changed .* use the step 'eager'"):
        step(*images(1)[0])
    handle.remove()
    step(*images(1)[0])
    method.move_to(1)
    with pytest.raises(LowcalError, match=r"hooks on 'blocks\.0\.conv1'"):
        step(*images(1)[0])


def test_too_many_graphs_are_an_error(counter):
    model = chain(4)
    optimizer, method = attached(model, "sgd")
    step = build_step("compiled", model, (optimizer,), method, OPTIONS)
    step(*images(1, size=3)[0])
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(LowcalError, match="cannot be compiled") as error:
        step(*images(1, size=4)[0])
    assert "\n" not in str(error.value)


def test_what_cannot_be_compiled_is_an_error(counter):
    class Printing(lowcal.Hebbian):
        def update(self, module, inputs, outputs):
            torch._dynamo.graph_break()
            return super().update(module, inputs, outputs)

    model = chain(4)
    optimizer, method = attached(model, "sgd")
    local = lowcal.LoCal(model, optimizer, epochs=3, rule=Printing(), example_inputs=images(1)[0][0])
    local.move_to(2)
    step = build_step("compiled", model, (optimizer,), method, OPTIONS)
    with pytest.raises(LowcalError, match=r"a block cannot be compiled .* use the step 'eager'") as error:
        step(*images(1)[0])
    assert "\n" not in str(error.value)
    counters.clear()


def test_a_network_without_blocks_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    optimizer, method = attached(model, "sgd")
    with pytest.raises(LowcalError, match="Sequential has no block of layers to compile; use the step 'eager'"):
        CompiledStep(model, (optimizer,), method, OPTIONS)


def test_it_resumes_exactly(tmp_path, counter):
    whole = run_on(make_run(tmp_path / "whole", step="compiled"))
    run_on(make_run(tmp_path / "parts", step="compiled"), 4)
    again = make_run(tmp_path / "parts", step="compiled")
    again.resume()
    again.warm_up()
    assert same(state(whole), state(run_on(again)))


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("resnet18", "stem", 9),
        ("vgg13", "features", 1),
        ("resnet50", "layer1.0", 16),
        ("mobilenet_v2", "features.0", 20),
        ("densenet121", "features.denseblock1.denselayer1", 61),
    ],
)
def test_blocks_are_the_network_s_own(name, first, count):
    with torch.device("meta"):
        model = build_model(name, classes=10)
    blocks = find_blocks(model)
    assert next(iter(blocks)) == first
    assert len(blocks) == count
    names = list(blocks)
    assert not [a for a in names for b in names if b.startswith(f"{a}.")]


@pytest.mark.slow
@pytest.mark.parametrize("norm_stats", ["batch", "running"])
def test_inductor_gives_eager_s_losses(monkeypatch, norm_stats):
    """Fifty steps and two moves; compiled kernels round otherwise, by a few units in the last place of each step."""
    losses = []
    for mode in ("eager", "compiled"):
        torch.manual_seed(0)
        model = network()
        optimizer, method = attached(model, norm_stats=norm_stats)
        generator = iter(images(50, seed=3))
        taken = []
        for boundary, steps in ((0, 20), (1, 15), (4, 15)):
            method.move_to(boundary)
            step = build_step(mode, model, (optimizer,), method, OPTIONS)
            taken += [step(*next(generator)) for _ in range(steps)]
        losses.append(torch.stack(taken))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(losses[0], losses[1])


@pytest.mark.slow
def test_normalisation_by_running_statistics_is_one_kernel_with_its_activation():
    from torch._inductor import metrics

    block = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(OrderedDict(block=block, flat=nn.Flatten(), head=nn.Linear(64, 3)))
    model = model.to(memory_format=torch.channels_last)  # as its convolution has it on CPU, else two more turn it round
    inputs, labels = images(1)[0]
    optimizer, method = attached(model, "freeze", moves={1: 1}, norm_stats="running")
    method.move_to(1)
    metrics.reset()
    step = build_step("compiled", model, (optimizer,), method, OPTIONS)
    step(inputs.contiguous(memory_format=torch.channels_last), labels)
    assert metrics.generated_kernel_count == 1
