import math

import pytest
import torch
from torch import nn

from lowcal.errors import LowcalError
from lowcal.models import MODELS, build_model, check_input, model_names


def conv_count(model):
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


# Convolutions and linear layers counted by hand; parameters by formula from the papers' layer tables.
@pytest.mark.parametrize(
    ("name", "convs", "parameters"),
    [
        # The count that is commonly given for the CIFAR-10 form of ResNet18.
        ("resnet18", 1 + 16 + 3, 11_173_962),
        ("resnet8", 1 + 6 + 2, None),
        # Convolutions without bias by configuration B, batch normalisation, and 512 -> 10.
        ("vgg13", 10, 9_402_048 + 2 * 2944 + 5130),
    ],
)
def test_size_of_our_networks(name, convs, parameters):
    model = build_model(name, classes=10)
    assert conv_count(model) == convs
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("channels", [1, 3])
def test_forward_and_backward(name, channels):
    model = build_model(name, classes=7, in_channels=channels, width=4)
    logits = model(torch.randn(3, channels, 32, 32))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_stem_keeps_the_size_and_stages_halve_it():
    model = build_model("resnet18", classes=10, width=8)
    x = model.stem(torch.randn(1, 3, 32, 32))
    sizes = [x.shape[1:]]
    for stage in model.stages:
        x = stage(x)
        sizes.append(x.shape[1:])
    assert sizes == [(8, 32, 32), (8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]


def test_width_scales_every_stage():
    narrow = build_model("vgg13", classes=10, width=8)
    assert [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)] == [
        8, 8, 16, 16, 32, 32, 64, 64, 64, 64,
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "first"), [("resnet34", 64), ("resnet50", 64), ("mobilenet_v2", 32)])
def test_torchvisions_networks_at_another_width(name, first):
    plain, narrow = build_model(name, classes=10), build_model(name, classes=10, width=first // 2)
    pairs = list(zip(plain.modules(), narrow.modules(), strict=True))
    assert [type(one) for one, _ in pairs] == [type(other) for _, other in pairs]
    channels = [(a.out_channels, b.out_channels) for a, b in pairs if isinstance(a, nn.Conv2d)]
    if name == "mobilenet_v2":
        assert channels.pop() == (1280, 1280)
        assert 0.5 <= sum(b for _, b in channels) / sum(a for a, _ in channels) < 0.6
    else:
        assert all(b == a // 2 for a, b in channels)
    assert narrow(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert all(parameter.device.type == "cpu" for parameter in narrow.parameters())
    same = build_model(name, classes=10, width=first)
    assert [p.shape for p in same.parameters()] == [p.shape for p in plain.parameters()]


def test_he_initialisation_by_fan_out():
    torch.manual_seed(0)
    model = build_model("resnet18", classes=10)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size)))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert conv.bias is None
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_identity_shortcut_adds_the_input():
    model = build_model("resnet18", classes=10, width=4).eval()
    block = model.stages[0][0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet34", "squeezenet1_1"])
def test_torchvision_by_name(name):
    model = build_model(name, classes=5)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_with_heads_aside_gives_one_output_in_training(name):
    with torch.device("meta"):
        model = build_model(name, classes=5)
    assert model.train()(torch.empty(2, 3, 299, 299, device="meta")).shape == (2, 5)


def test_names_hold_ours_and_torchvisions():
    names = model_names()
    assert {"resnet8", "resnet18", "vgg13", "resnet50", "vit_b_16"} <= set(names)
    assert not any("rcnn" in name or "deeplab" in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19", "classes": 10}, r"unknown model 'resnet19'; did you mean 'resnet18'\?"),
        ({"name": "alexnet", "classes": 10, "width": 32}, "no settable width"),
        ({"name": "resnet50", "classes": 10, "in_channels": 1}, "3 channels, not 1"),
        ({"name": "resnet18", "classes": 10, "width": 0}, "width is 0"),
        ({"name": "resnet18", "classes": 0}, "classes is 0"),
        ({"name": "resnet18", "classes": 10, "in_channels": 0}, "in_channels is 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(LowcalError, match=message) as caught:
        build_model(**arguments)
    assert "\n" not in str(caught.value)


def test_check_input_accepts_and_changes_nothing():
    model = build_model("resnet8", classes=10, in_channels=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_input(model, "resnet8", (1, 8, 8), 10)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "size"), [("vgg13", (3, 8, 8)), ("vit_b_32", (3, 32, 32)), ("resnet8", (1, 8, 8))])
def test_check_input_names_model_and_size(name, size):
    with torch.device("meta"):
        model = build_model(name, classes=10)
    with pytest.raises(LowcalError, match=f"{name}.*{size[0]}x{size[1]}x{size[2]}") as caught:
        check_input(model, name, size, 10)
    assert "\n" not in str(caught.value)
