"""Every network that prune is meant for: what it computes is what it computed with those channels zeroed."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from lowcal import LowcalError
from lowcal.method_settings import PruneSettings
from lowcal.methods import build_method
from lowcal.methods.channel_groups import find_groups
from lowcal.models import SmallResNet, build_model

from ..networks import Residual, convnet
from ..support import sgd, train_step, weights


def flattened():
    """Convolutions with biases; a hidden linear layer of four inputs for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, stride=2, groups=1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(24),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(10, 3),
    )


NETWORKS = {
    "resnet8": lambda: SmallResNet((1, 1, 1), classes=3, in_channels=3, width=4),
    "resnet18": lambda: SmallResNet((2, 2, 2, 2), classes=3, in_channels=3, width=4),
    "vgg13": lambda: build_model("vgg13", classes=3, width=4),
    "resnet34": lambda: build_model("resnet34", classes=3, width=8),
    "resnet50": lambda: build_model("resnet50", classes=3, width=8),
    "mobilenet_v2": lambda: models.mobilenet_v2(width_mult=0.25, num_classes=3),
    "flattened": flattened,
    "googlenet": lambda: build_model("googlenet", classes=3),
}
CHANNELS = {  # groups, and the channels in them, counted by hand from the networks' definitions
    "resnet8": (6, 2 * (4 + 8 + 16)),
    "resnet18": (12, 3 * (4 + 8 + 16 + 32)),
    "vgg13": (10, 2 * (4 + 8 + 16 + 32 + 32)),
    "resnet34": (20, (8 + 8 * 3) + (16 * 4 + 16) + (32 * 6 + 32) + (64 * 3 + 64)),
    "resnet50": (37, 8 + (32 + 6 * 8) + (64 + 8 * 16) + (128 + 12 * 32) + (256 + 6 * 64)),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_groups_are_those_that_the_definition_has(name):
    groups = find_groups(NETWORKS[name]())
    assert (len(groups), sum(group.channels for group in groups)) == CHANNELS[name]
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_it_did_with_those_channels_zeroed(name):
    torch.manual_seed(1)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        expected = {}
        for group in find_groups(model):
            gone = torch.randperm(group.channels)[: max(1, group.channels // 3)]
            expected[group.name] = sorted(set(range(group.channels)) - set(gone.tolist()))
            for layer in group.makers:
                model.get_submodule(layer).weight[gone] = 0
            for layer in group.users:
                model.get_submodule(layer).weight.unflatten(1, (group.channels, -1))[:, gone] = 0
    zeroed = copy.deepcopy(model)
    optimizer = sgd(model)
    size = 64 if name == "googlenet" else 32
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    method = build_method("prune", model, optimizer, PruneSettings(every=1), epochs=2, example_inputs=images)
    keys, types = list(weights(model)), [type(module) for module in model.modules()]
    assert method.end_epoch(1.0)
    assert method.state_dict()["kept"] == expected
    assert (list(weights(model)), [type(module) for module in model.modules()]) == (keys, types)
    with FlopCounterMode(display=False) as pruned_flops, torch.no_grad():
        pruned = model.eval()(images)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        torch.testing.assert_close(pruned, zeroed.eval()(images), rtol=1e-9, atol=1e-10)
    assert pruned_flops.get_total_flops() < 0.8 * flops.get_total_flops()
    model.train(), zeroed.train()
    with torch.no_grad():
        torch.testing.assert_close(model(images), zeroed(images), rtol=1e-6, atol=1e-8)
    for module in model.modules():  # the layers' own account of their sizes is right
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,)
    train_step(model, optimizer, (images, torch.tensor([0, 2])))


def test_an_inverted_residual_block_without_channels_is_its_shortcut():
    model = NETWORKS["mobilenet_v2"]().double()
    block = model.features[3]
    with torch.no_grad():
        block.conv[0][0].weight.zero_()
        block.conv[2].weight.zero_()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.features[3].conv[3].weight.zero_()
        zeroed.features[3].conv[3].bias.zero_()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    method = build_method("prune", model, sgd(model), PruneSettings(every=1), epochs=2, example_inputs=images)
    assert method.end_epoch(1.0)
    assert method.state_dict()["removed"] == ["features.3"]
    torch.testing.assert_close(model.eval()(images), zeroed.eval()(images), rtol=1e-9, atol=1e-10)


def test_channels_that_go_through_anything_unknown_are_left_alone():
    model = Residual()  # `first` feeds `second`; all else meets a bare parameter, a shortcut or an end
    assert [(group.makers, group.users, group.carriers) for group in find_groups(model)] == [
        (("stem",), ("first", "shortcut"), ()),
        (("first",), ("second",), ("first_norm",)),
        (("middle",), ("head",), ()),
    ]
    # A grouped convolution that is not depthwise ties both its sides.
    assert [group.name for group in find_groups(convnet())] == ["conv3"]


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.three(torch.cat((self.one(x), self.two(x)), dim=1))
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    """One convolution that runs twice, so that its inputs and its outputs are the same channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(self.conv(self.stem(x)).relu()).mean((2, 3)))


class PerPixel(nn.Module):
    """A linear layer over the last dimension, which is not the channels'."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.width = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Linear(4, 4)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.other(self.width(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "makers"),
    [
        (Concatenated, [("three",)]),
        (Twice, [("stem", "conv")]),
        (PerPixel, [("other",)]),
    ],
)
def test_groups_of_unusual_networks(network, makers):
    assert [group.makers for group in find_groups(network())] == makers


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.two(self.one(x)) if x.sum() > 0 else self.two(self.one(-x))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Branching(), "cannot trace the forward pass of Branching"), (nn.Conv2d(3, 4, 1), "finds no channel in Conv2d")],
)
def test_a_network_that_cannot_be_pruned_is_refused(model, message):
    with pytest.raises(LowcalError, match=message) as error:
        find_groups(model)
    assert "\n" not in str(error.value)
