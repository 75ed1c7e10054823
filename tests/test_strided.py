import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lowcal import hebbian_update
from lowcal.models import build_model
from lowcal.strided import is_unsafe, slice_inputs


def conv(inputs=4, kernel=1, stride=2, dims=2, **options):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return kind(inputs, 8, kernel, stride=stride, **options)


def test_strided_1x1_convolutions_with_few_input_channels_are_unsafe():
    assert all(is_unsafe(conv(inputs)) for inputs in (2, 7, 8, 15))
    assert is_unsafe(conv(stride=(1, 3)))
    assert is_unsafe(conv(padding="valid", stride=4))
    assert is_unsafe(nn.Conv2d(4, 64, 1, stride=2, bias=False))


def test_other_layers_are_safe():
    safe = [conv(16), conv(stride=1), conv(kernel=3), conv(kernel=(1, 3)), conv(padding=1), conv(groups=2)]
    safe += [conv(dims=1), conv(dims=3), nn.Linear(4, 8), nn.ConvTranspose2d(4, 8, 1, stride=2)]
    assert not any(is_unsafe(module) for module in safe)


@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_a_sliced_network_computes_the_same(stride):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), conv(stride=stride)).double()
    sliced = copy.deepcopy(plain)
    assert slice_inputs(sliced) == ["2"]
    assert slice_inputs(sliced) == []
    assert sliced.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(sliced)
    images = torch.randn(3, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    expected = plain(images)
    gradients = torch.autograd.grad(expected.square().sum(), [images, *plain.parameters()])
    for network in (sliced, copied):
        outputs = network(images)
        torch.testing.assert_close(outputs, expected)
        found = torch.autograd.grad(outputs.square().sum(), [images, *network.parameters()])
        torch.testing.assert_close(found, gradients)


def test_networks_without_such_layers_are_left_alone():
    def changed(width):
        return slice_inputs(build_model("resnet8", classes=4, width=width))

    assert changed(16) == []
    assert changed(8) == ["stages.1.0.shortcut.0"]
    assert changed(4) == ["stages.1.0.shortcut.0", "stages.2.0.shortcut.0"]


def test_layers_elsewhere_than_on_a_processor_are_left_alone():
    assert slice_inputs(build_model("resnet8", classes=4, width=4).to("meta")) == []


@pytest.mark.parametrize(("channels", "last"), [(3, "inputs"), (12, "weight"), (3, "both")])
def test_the_local_update_compiles_and_matches_double_precision(channels, last):
    module = conv(channels)
    inputs = torch.randn(3, channels, 9, 8)
    with torch.no_grad():
        outputs = module(inputs)
    expected = hebbian_update(copy.deepcopy(module).double(), inputs.double(), outputs.double())
    if last != "inputs":
        module = module.to(memory_format=torch.channels_last)
    if last != "weight":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    for update in (hebbian_update, torch.compile(hebbian_update, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(update(module, inputs, outputs).double(), expected, rtol=1e-4, atol=1e-4)


# Effects of a write outside of its memory vary, so the C library checks the memory at each `free`.
CODE = """
import torch, lowcal
from lowcal.models import build_model
from lowcal.strided import slice_inputs

for threads in (1, 2):
    torch.set_num_threads(threads)
    for options in ({}, {"padding": 1, "padding_mode": "reflect"}):  # reflected padding is made before the product
        module = torch.nn.Conv2d(4, 8, 1, stride=2, **options).to(memory_format=torch.channels_last)
        inputs = torch.randn(8, 4, 32, 32).contiguous(memory_format=torch.channels_last)
        outputs = module(inputs)
        for _ in range(10):
            lowcal.hebbian_update(module, inputs, outputs)
    model = build_model("resnet8", classes=4, width=4).to(memory_format=torch.channels_last)
    slice_inputs(model)
    for _ in range(6):
        images = torch.randn(50, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        model(images).square().sum().backward()
"""


def test_local_updates_and_training_stay_within_their_memory():
    checks = {"MALLOC_CHECK_": "3", "LD_PRELOAD": "libc_malloc_debug.so.0"}  # newer C libraries have the check there
    command = [sys.executable, "-c", CODE]
    ended = subprocess.run(command, env={**os.environ, **checks}, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-1000:]
