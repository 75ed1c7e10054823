"""The kernels of `lowcal.fused` on the CPU; `test_fused.py` runs these in a process with Triton's interpreter."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowcal
from lowcal import fused, rules

from .networks import convnet, images

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, at 1 / 0

SHAPES = [(3, 2, 3, 3), (16, 5), (1,), (8, 4, 1, 1), (6, 1, 3), (2, 3, 2, 2, 2), (fused.BLOCK + 1,), (70, 61)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {
    "number": 0.25,
    "0-d": torch.tensor(-0.25),
    "each": torch.tensor([0.5, -0.25, 0.0, 2.0, 1e-3, -1.0, 0.125, 3.0], dtype=torch.float64),
}


def pairs(weight_type=torch.float32, update_type=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(weight_type) for shape in shapes]
    return weights, [(3 * torch.randn(shape, generator=generator)).to(update_type) for shape in shapes]


def expected(weights, updates, step, relative):
    """Eq. 4 in double precision."""
    for index, (weight, update) in enumerate(zip(weights, updates, strict=True)):
        eta = step[index] if isinstance(step, torch.Tensor) and step.dim() else step
        length = weight.double().norm() if relative else 1.0
        yield weight.double() + float(eta) * length * update.double() / update.double().norm()


def check(weights, updates, step, relative=False):
    before, directions = [w.clone() for w in weights], [u.clone() for u in updates]
    skipped = fused.apply_updates(weights, updates, step, relative=relative)
    assert int(skipped) == 0
    assert (skipped.dim(), skipped.dtype) == (0, torch.int64)
    epsilon = torch.finfo(weights[0].dtype).eps
    for found, old, wanted in zip(weights, before, expected(before, directions, step, relative), strict=True):
        assert found.stride() == old.stride()
        torch.testing.assert_close(found.double(), wanted, rtol=2 * epsilon, atol=2e-6)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_equation_4(step, relative):
    check(*pairs(), STEPS[step], relative)


@pytest.mark.parametrize("update_type", FLOATS)
@pytest.mark.parametrize("weight_type", FLOATS)
def test_types(weight_type, update_type):
    weights, updates = pairs(weight_type, update_type)
    assert all(map(fused.takes, weights, updates))
    check(weights, updates, 0.25, relative=True)


def test_a_layer_of_more_blocks_than_programs():
    check(*pairs(shapes=[(fused.PARTS * fused.BLOCK + 17,), (5,)]), 10.0, relative=True)


@pytest.mark.parametrize("like", ["weight", "contiguous", "other"])
@pytest.mark.parametrize("memory", ["channels_last", "transposed"])
def test_memory_formats(memory, like):
    weights, updates = pairs(shapes=[(4, 6, 3, 3), (8, 8, 1, 1), (1, 5, 3, 3)])
    order = (0, 2, 3, 1) if memory == "channels_last" else (3, 1, 0, 2)
    back = [order.index(d) for d in range(4)]
    weights = [weight.permute(order).contiguous().permute(back) for weight in weights]
    if like == "weight":
        updates = [update.permute(order).contiguous().permute(back) for update in updates]
    elif like == "other":
        updates = [update.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3) for update in updates]
    assert all(map(fused.takes, weights, updates))
    check(weights, updates, 0.25)


def test_a_weight_at_an_odd_address():
    weights, updates = pairs(shapes=[(16,), (64,)])
    weights = [torch.cat([torch.zeros(1), weight])[1:] for weight in weights]
    check(weights, updates, 0.25)


def test_what_is_not_taken():
    single, double = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.float64)
    assert fused.takes(single, single.bfloat16())
    assert not fused.takes(double, double)
    assert not fused.takes(single, double)
    assert not fused.takes(torch.ones(4, 8)[:, ::2], single)  # gaps
    assert not fused.takes(torch.ones(4).expand(4, 4), single)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("relative", [False, True])
def test_a_norm_that_is_zero_or_not_finite_leaves_the_weight_and_is_counted(step, relative):
    weights, updates = pairs()
    updates[0].zero_()
    updates[1][3, 2] = torch.inf
    updates[3][0] = torch.nan
    updates[4].fill_(1e30)  # its sum of squares overflows
    left = [0, 1, 3, 4]
    before, directions = [w.clone() for w in weights], [u.clone() for u in updates]
    by_operators = [w.clone() for w in weights]
    skipped = fused.apply_updates(weights, updates, STEPS[step], relative=relative)
    assert int(skipped) == len(left)
    assert int(rules.apply_updates(by_operators, directions, STEPS[step], relative=relative)) == len(left)
    for index, (found, old) in enumerate(zip(weights, before, strict=True)):
        assert torch.equal(found, old) == (index in left or (step == "each" and not STEPS[step][index]))
    torch.testing.assert_close(weights, by_operators)


def test_a_weight_whose_norm_overflows_stays_as_it_is_under_relative_steps():
    weights, updates = pairs(shapes=[(3,), (4,)])
    weights[0].fill_(1e30)
    before = [weight.clone() for weight in weights]
    assert int(fused.apply_updates(weights, updates, 0.25, relative=True)) == 0
    assert [torch.equal(*pair) for pair in zip(weights, before, strict=True)] == [True, False]


def test_runs_are_alike_to_the_bit():
    results = []
    for _ in range(2):
        weights, updates = pairs()
        fused.apply_updates(weights, updates, 0.25, relative=True)
        results.append(weights)
    assert all(map(torch.equal, *results))


def test_autograd_sees_the_change():
    weights, updates = pairs()
    before = [weight._version for weight in weights]
    fused.apply_updates(weights, updates, 0.25)
    assert all(weight._version > version for weight, version in zip(weights, before, strict=True))


class Operators(TorchDispatchMode):
    """Lists the operators of torch that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_two_kernels_and_no_other_launch_whatever_the_number_of_layers(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(grid[1])

    monkeypatch.setattr(fused, "_sum_squares", Kernel())
    monkeypatch.setattr(fused, "_add", Kernel())
    for count in (1, 30, fused.LAYERS):
        launched.clear()
        weights, updates = pairs(shapes=[(3, 3)] * count)
        with Operators() as operators:
            fused.apply_updates(weights, updates, 0.25)
        assert launched == [count, count]
        assert set(operators.names) <= {"empty", "select", "slice"}


@pytest.mark.parametrize("count", [16, 17, 33, 64])
def test_each_layer_has_its_own_step_whatever_their_number(count):
    """The kernels are compiled for 16, 32 or 64 layers."""
    check(*pairs(shapes=[(2, index + 1) for index in range(count)]), 0.25, relative=True)


@pytest.mark.parametrize("step", ["number", "each"])
def test_more_layers_than_a_launch_takes(monkeypatch, step):
    monkeypatch.setattr(fused, "LAYERS", 3)
    weights, updates = pairs()
    updates[1].zero_()
    updates[7].zero_()
    by_operators = [weight.clone() for weight in weights]
    assert int(fused.apply_updates(weights, updates, STEPS[step])) == 2
    rules.apply_updates(by_operators, updates, STEPS[step])
    torch.testing.assert_close(weights, by_operators)


@pytest.mark.parametrize("decay_from", ["start", "switch"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_as_by_operators(monkeypatch, autocast, decay_from):
    used = []

    def apply(weights, updates, step, relative):
        used.append({update.dtype for update in updates})
        return fused.apply_updates(weights, updates, step, relative)

    class Kernels:
        takes = staticmethod(fused.takes)
        apply_updates = staticmethod(apply)

    results = []
    for kernels in (None, Kernels):
        monkeypatch.setattr(rules, "_kernels", lambda device, kernels=kernels: kernels)
        torch.manual_seed(0)
        model = convnet().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        rule = lowcal.Hebbian(scale="relative", decay_from=decay_from)
        local = lowcal.LoCal(model, optimizer, epochs=4, rule=rule, example_inputs=images(1)[0][0])
        local.move_to(2)
        for inputs, labels in images(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(inputs).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(model.state_dict())
    assert used == [{torch.bfloat16 if autocast else torch.float32}] * 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
