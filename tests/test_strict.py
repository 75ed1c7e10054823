"""A step's operators get tensors of one type and one device, as a GPU asks."""

import copy

import pytest
import torch
from torch import nn

import lowcal
from lowcal.methods import METHODS, build_method
from lowcal.methods.boundary import Local
from lowcal.steps.step import PRECISIONS, EagerStep, StepOptions, build_scaler

from .networks import Residual, convnet, images, mlp
from .strict import Strict
from .training.runs import OTHER_SETTINGS, network, settings

CPU = torch.device("cpu")

RULES = {
    "hebbian": lowcal.Hebbian(),
    "relative": lowcal.Hebbian(scale="relative"),
    "every": lowcal.Hebbian(every=2),
    "switch": lowcal.Hebbian(decay_from="switch"),
    "frozen": lowcal.Frozen(),
    "refresh": lowcal.Refresh(every=2),
}


def chain(convolution, norm, size):
    """Layers of each kind of padding and grouping in a row, for (N, 4, size...)."""
    return nn.Sequential(
        convolution(4, 4, 3, padding=1),
        norm(4),
        nn.ReLU(),
        convolution(4, 4, 3, padding="same", padding_mode="reflect", bias=False),
        nn.ReLU(),
        convolution(4, 4, 3, padding=1, groups=4),
        convolution(4, 4, 1, stride=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


NETWORKS = {
    "mlp": (mlp, (4,)),
    "convnet": (convnet, (2, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "1d": (lambda: chain(nn.Conv1d, nn.BatchNorm1d, 1), (4, 8)),
    "2d": (lambda: chain(nn.Conv2d, nn.BatchNorm2d, 2), (4, 8, 8)),
    "3d": (lambda: chain(nn.Conv3d, nn.BatchNorm3d, 3), (4, 4, 4, 4)),
}


def steps(network, rule, precision, device, *, channels_last=False, count=3):
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model = make()
    model(torch.zeros(2, *shape))  # gives lazy layers their sizes
    model = copy.deepcopy(model).to(device)
    inputs, labels = torch.rand(6, *shape, device=device), torch.zeros(6, dtype=torch.long, device=device)
    if channels_last and inputs.dim() == 4:
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    if precision == "pure bf16":
        model, inputs = model.to(torch.bfloat16), inputs.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    local = lowcal.LoCal(model, optimizer, epochs=4, rule=rule, example_inputs=inputs)
    local.move_to(len(local.layers) - 1)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with Strict():
        for _ in range(count):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(model(inputs).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, before


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16", "pure bf16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_operator_gets_tensors_of_one_type(network, rule, precision):
    model, before = steps(network, RULES[rule], precision, "cpu", channels_last=rule == "relative")
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", ["convnet", "mlp"])
def test_every_operator_gets_tensors_of_one_device(network, rule):
    steps(network, RULES[rule], "float32", "meta")


def test_the_mode_refuses_what_a_gpu_refuses():
    weight, inputs = torch.rand(4, 4, 3, 3), torch.rand(2, 4, 8, 8).bfloat16()
    arguments = (weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, [False, True, False])
    with Strict(), pytest.raises(TypeError, match="convolution_backward: types"):
        torch.ops.aten.convolution_backward(inputs, inputs, *arguments)
    with Strict(), pytest.raises(TypeError, match="devices"):
        torch.ops.aten.mm(torch.rand(2, 2), torch.rand(2, 2, device="meta"))
    with Strict():  # promoted on a GPU too
        assert (weight[0, 0, 0] + inputs[0, 0, 0, :3]).dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_s_whole_step(method, precision):
    torch.manual_seed(0)
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    own = OTHER_SETTINGS.get(METHODS[method].section, settings(every=2, refresh_every=3))
    attached = build_method(method, model, optimizer, own, epochs=9, example_inputs=torch.zeros(1, 2, 6, 6))
    if issubclass(METHODS[method], Local):
        attached.move_to(4)
    options = StepOptions(CPU, precision, build_scaler(CPU, precision), guard=True, max_norm=1.0)
    step = EagerStep(model, (optimizer,), attached, options)
    with Strict():
        losses = [step(*batch) for batch in images(4)]
    assert all(loss.isfinite() for loss in losses)
