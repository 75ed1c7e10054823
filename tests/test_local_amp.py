"""Mixed precision: a step that the scaler skips applies no local update, neither then nor in the next step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adam, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import lowcal

from .networks import convnet, images, mlp, vectors
from .reference import weight_product
from .support import ORDERS, changed, same, train_step, weights

KINDS = {
    "sgd": lambda parameters, fused: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused),
    "adam": lambda parameters, fused: Adam(parameters, lr=0.01, fused=fused),
    "adamw": lambda parameters, fused: AdamW(parameters, lr=0.01, weight_decay=0.1, fused=fused),
}


def zeroing(model, optimizer, spelling):
    """The ways in which a loop may zero its gradients."""
    return {
        "set_to_none": optimizer.zero_grad,
        "in place": lambda: optimizer.zero_grad(set_to_none=False),
        "of the model": model.zero_grad,
        "by hand": lambda: [setattr(parameter, "grad", None) for parameter in model.parameters()],
    }[spelling]


def run(plan, *, kind="sgd", fused=False, order="between", spelling="set_to_none", micro=1, frozen=()):
    """Weights after the steps of `plan`, pairs of (seed of the data, whether its gradient is infinite)."""
    torch.manual_seed(2)
    model = convnet(norm=False)
    optimizer = KINDS[kind](model.parameters(), fused)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=images(1)[0][0])
    zero_grad = zeroing(model, optimizer, spelling)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
    train_step(model, optimizer, images(1)[0], order=order, zero_grad=zero_grad, scaler=scaler)
    local.move_to(2)
    for seed, spoil in plan:
        before = weights(model)
        batches = images(micro, seed=seed)
        train_step(model, optimizer, *batches, order=order, zero_grad=zero_grad, scaler=scaler, spoil=spoil)
        assert bool(changed(before, model)) is not spoil
    return weights(model), local


GOOD, MIXED = (
    [(3, False), (5, False), (6, False)],
    [(3, False), (4, True), (5, False), (7, True), (8, True), (6, False)],
)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "options",
    [
        *({"kind": kind, "order": order} for kind, order in zip(KINDS, ORDERS, strict=True)),
        *({"spelling": "in place", "order": order} for order in ORDERS),
        {"spelling": "in place", "order": "after", "micro": 3},
        {"spelling": "of the model", "order": "before", "micro": 3},
        {"spelling": "by hand", "micro": 3},
        {"frozen": ["head"]},  # by the user: another weight's gradient has to be observed
    ],
    ids=str,
)
def test_a_skipped_step_leaves_no_trace(options, fused):
    mixed, local = run(MIXED, fused=fused, **options)
    assert same(mixed, run(GOOD, fused=fused, **options)[0])
    assert local._local_layers.updates.skipped == 0  # of a skipped step no update is counted as left out


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_prefix_that_overflows_in_a_skipped_step_leaves_no_trace(fused):
    """The usual cause of a skipped step: the forward pass itself overflows, local layers included."""
    states = []
    for overflowing in (False, True):
        torch.manual_seed(2)
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
        local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=vectors(1)[0][0])
        local.move_to(2)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
        for index, (inputs, labels) in enumerate(vectors(3)):
            if index == 1 and not overflowing:
                continue
            bad = index == 1
            train_step(model, optimizer, (inputs * torch.inf if bad else inputs, labels), scaler=scaler)
        states.append(weights(model))
    assert same(*states)
    assert all(value.isfinite().all() for value in states[1].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_step_is_equation_4_within_its_precision(dtype):
    model = convnet(norm=False, inplace=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=images(1)[0][0])
    local.move_to(2)
    inputs, labels = images(1)[0]
    before = weights(model)
    with torch.autocast("cpu", dtype=dtype):
        a = inputs
        updates = {}
        with torch.no_grad():
            for name, module in list(model.named_children())[:3]:
                z = module(a)
                if name in ("conv1", "conv2"):
                    updates[name] = weight_product(module, a, z)
                a = z
        loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for name, update in updates.items():
        move = (model.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"]).double()
        torch.testing.assert_close(move, 0.01 * update / update.norm(), atol=0.01 * 4 * torch.finfo(dtype).eps, rtol=0)
        assert model.get_parameter(f"{name}.weight").dtype == torch.float32


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_half_precision_on_a_gpu_is_multiplied_in_what_it_can(monkeypatch, major, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    with FakeTensorMode():
        layer = nn.Conv2d(2, 4, 3, device="cuda")
        inputs, outputs = (torch.empty(5, n, s, s, dtype=torch.float16, device="cuda") for n, s in ((2, 6), (4, 4)))
        with Products() as products:
            update = lowcal.hebbian_update(layer, inputs, outputs)
    assert (update.device.type, update.dtype) == ("cuda", torch.float32)
    assert products.dtypes == [(dtype, dtype)]


class Products(TorchDispatchMode):
    """The types of the inputs and outputs that products are made of."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.dtypes.append((args[0].dtype, args[1].dtype))
        return func(*args, **(kwargs or {}))
