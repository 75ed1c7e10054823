"""Families of networks: before the boundary nothing is kept for a backward pass, and no parameter is reached by one."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import lowcal

from .networks import Residual
from .support import changed, reached, refused, sgd, train_step, weights


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.join, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.up = nn.ConvTranspose2d(6, 3, 2, 2)
        self.down, self.middle = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        skipped = self.down(x).relu()
        x = self.middle(nn.functional.max_pool2d(skipped, 2)).relu()
        return self.head(self.join(torch.cat([self.up(x), skipped], 1)).relu())


class Recurrent(nn.Module):
    """An LSTM, a GRU and a cell that is unrolled by hand, each after a linear layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.lstm, self.gru = nn.LSTM(6, 6, 2, batch_first=True), nn.GRU(6, 6, batch_first=True, bidirectional=True)
        self.cell = nn.LSTMCell(6, 6)

    def forward(self, x):
        x = self.lstm(self.one(x))[0]
        x = self.gru(self.two(x))[0][..., :6]
        x = self.three(x)
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.four(state[0])


class Encoder(nn.Module):
    """Has a layer that does not run, so that a pass in evaluation mode looks for it, where torch has a fast path."""

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x):
        return self.last(self.encoder(self.first(x)).mean(1))


class Uncalled(nn.Module):
    """Uses the weights of layers that it does not call."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.four, self.five = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.two((x @ self.one.weight.T + self.one.bias).relu())
        return self.five(self.four(nn.functional.linear(x, self.three.weight.mT)))


def swin(**options):
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3, **options)


V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
BLOCKS = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]
# network -> (builder, shape of its input, layers that never run as modules)
FAMILIES = {
    "residual": (Residual, (2, 2, 6, 6), 0),
    "resnet": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 3), (2, 3, 32, 32), 0,
    ),
    "u-net": (UNet, (2, 2, 6, 6), 0),
    "recurrent": (Recurrent, (2, 3, 4), 0),
    "transformer encoder": (Encoder, (2, 3, 4), 1),
    "vit": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3), (1, 3, 16, 16), 0),
    "convnext": (lambda: torchvision.models.ConvNeXt(BLOCKS, num_classes=3), (1, 3, 32, 32), 0),
    "swin": (swin, (1, 3, 32, 32), 4),
    "swin v2": (lambda: swin(**V2), (1, 3, 32, 32), 4),
    "uncalled": (Uncalled, (2, 4), 2),
}  # fmt: skip


def controller(model, **options):
    options = {"schedule": lowcal.Fixed({1: 1}), "supervision": None, **options}
    return lowcal.LoCal(model, sgd(model), epochs=9, **options)


@pytest.mark.parametrize("rule", [lowcal.Hebbian(), lowcal.Frozen()], ids=["hebbian", "frozen"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_back_propagation_ends_at_the_boundary(name, rule):
    build, shape, uncalled = FAMILIES[name]
    model, inputs = build(), torch.randn(shape)
    local = controller(model, rule=rule, example_inputs=inputs)
    depth = len(local.layers)
    assert local.summary().count("cannot become local") == 0
    assert depth == uncalled * -1 + sum(
        isinstance(m, (nn.Linear, nn.Conv2d)) and type(m).__name__ != "NonDynamicallyQuantizableLinear"
        for m in model.modules()
    )
    kept = sum(parameter.numel() for parameter in model.parameters())
    for boundary in sorted({1, depth // 2, depth - 1}):
        local.move_to(boundary)
        saved, entered = [], []

        def pack(tensor, saved=saved, entered=entered):
            if not entered:
                saved.append(tensor.shape)
            return tensor

        transition = model.get_submodule(local.layers[boundary])
        handle = transition.register_forward_pre_hook(lambda *_, entered=entered: entered.append(1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(inputs)
        handle.remove()
        assert entered
        assert not saved
        learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        found = reached(model, outputs.sum())
        unused = {key for key in learning if key.startswith("unused.")}
        assert found == learning - unused
        assert not any(key.startswith(tuple(f"{layer}." for layer in local.layers[:boundary])) for key in found)
        size = sum(model.get_parameter(key).numel() for key in found)
        assert size < kept  # each move takes parameters away
        kept = size


@pytest.mark.parametrize("name", ["residual", "u-net", "recurrent", "transformer encoder", "vit", "uncalled"])
def test_a_step_moves_what_it_should(name):
    build, shape, _ = FAMILIES[name]
    model, inputs = build().train(), torch.randn(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    local = lowcal.LoCal(
        model, optimizer, epochs=9, schedule=lowcal.Fixed({1: 1}), supervision=None, example_inputs=inputs
    )
    model(inputs).square().sum().backward()
    optimizer.step()
    boundary = len(local.layers) // 2
    local.move_to(boundary)
    optimizer.zero_grad()
    outputs = model(inputs)
    found = reached(model, outputs.sum())
    outputs.square().sum().backward()
    before = weights(model)
    optimizer.step()
    moved = {key for key in changed(before, model) if key in dict(model.named_parameters())}
    local_weights = {f"{layer}.weight" for layer in local.layers[:boundary]}
    assert local_weights <= moved <= found | local_weights
    for key in local_weights:
        assert float((model.get_parameter(key).detach() - before[key]).norm()) == pytest.approx(0.01, rel=1e-3)


class Decoder(nn.Module):
    """An autoencoder whose decoder uses the encoder's weight, read through `view`."""

    def __init__(self, view):
        super().__init__()
        self.encode, self.middle, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(4, 3)
        self.view = view

    def forward(self, x):
        return self.out(self.middle(self.encode(x)) @ self.view(self.encode.weight))


@pytest.mark.parametrize(
    "view", [lambda w: w, lambda w: w.t().mT, lambda w: w.T.T, lambda w: w[:]],
    ids=["itself", "t", "T", "slice"],
)  # fmt: skip
def test_a_weight_that_is_used_again_is_refused(view):
    model, inputs = Decoder(view), torch.randn(2, 4)
    optimizer = sgd(model)
    with refused("'encode' is also used outside of that layer", model=model, optimizer=optimizer):
        lowcal.LoCal(model, optimizer, epochs=9, schedule=lowcal.Fixed({1: 1}), example_inputs=inputs)


def test_reading_a_gradient_is_no_use_of_the_weight():
    class Reads(Decoder):
        def forward(self, x):
            x = self.middle(self.encode(x))
            return self.out(x[:, :4] * (1 if self.encode.weight.grad is None else 2))

    model = Reads(None)
    model(torch.randn(2, 4)).sum().backward()
    controller(model, example_inputs=torch.randn(2, 4)).move_to(1)


def test_a_discriminator_passes_gradients_through_its_local_layers():
    """In the generator's turn they go on to the generator, and change nothing in the discriminator."""
    generator, discriminator = (
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)),
    )
    optimizers = [sgd(generator), sgd(discriminator)]
    local = lowcal.LoCal(
        discriminator, optimizers[1], epochs=9, schedule=lowcal.Fixed({1: 2}), example_inputs=torch.randn(1, 4)
    )
    local.move_to(2)
    noise, real = torch.randn(5, 2), torch.randn(5, 4)
    for frozen in (False, True):
        before = weights(discriminator)
        discriminator.requires_grad_(not frozen)
        loss = discriminator(generator(noise)).sum()
        optimizers[0].zero_grad()
        loss.backward()
        assert generator[0].weight.grad.norm() > 0
        optimizers[0].step()
        discriminator.requires_grad_(True)
        assert not changed(before, discriminator)
        optimizers[1].zero_grad()
        (discriminator(real).sum() - discriminator(generator(noise).detach()).sum()).backward()
        optimizers[1].step()
        assert {"0.weight", "2.weight", "4.weight"} <= changed(before, discriminator)
        for layer in (0, 2):
            change = discriminator[layer].weight.detach() - before[f"{layer}.weight"]
            assert float(change.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_layer_that_a_recurrence_calls_in_each_step_is_refused():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.state, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            state = torch.zeros_like(x)
            for _ in range(2):
                state = (self.inner(x) + self.state(state)).tanh()
            return self.head(state)

    model = Looped()
    with pytest.raises(lowcal.LowcalError, match="'inner' runs twice in one forward pass"):
        controller(model, example_inputs=torch.randn(2, 4))
    model.inner.weight.requires_grad_(False)  # a weight that does not learn has no update to make
    controller(model, example_inputs=torch.randn(2, 4)).move_to(1)
    train_step(model, sgd(model), (torch.randn(2, 4), torch.tensor([0, 1])))
