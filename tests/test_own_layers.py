"""Layers of one's own classes, with a forward of their own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowcal

from .networks import images, mlp, vectors
from .reference import local_step, weight_product
from .support import changed, same, sgd, train_step, weights


def control(model, optimizer=None, **options):
    return lowcal.LoCal(
        model, optimizer or sgd(model), epochs=9, schedule=lowcal.Fixed({1: 1}), supervision=None, **options
    )


class ConvNormAct(nn.Conv2d):
    """As detectron2's: normalisation and activation inside, the latter in place."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x, gain=1.0):
        return F.relu_(self.norm(F.conv2d(x * gain, self.weight, self.bias, padding=self.padding)))


class DropLinear(nn.Linear):
    def forward(self, x):
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


class SamePad(nn.Conv2d):
    """As timm's: pads in its own forward."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 1, 0)), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), padding=self.padding)


def own_network(first):
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [ConvNormAct, SamePad])
def test_dw_is_that_of_the_inner_product(kind, compiled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs, labels = images(1)[0]
    model = own_network(kind(2, 4, 3, padding=1) if kind is ConvNormAct else kind(2, 4, 2, stride=2, padding=0))
    model(inputs)
    local = control(model, optimizer=(optimizer := sgd(model)), example_inputs=inputs)
    local.move_to(1)
    layer = model[0]
    plain = nn.Conv2d(2, 4, layer.kernel_size, layer.stride, layer.padding)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})
    a = inputs if kind is ConvNormAct else F.pad(inputs, (0, 1, 1, 0))
    update = weight_product(plain, a, plain(a))
    before = layer.weight.detach().clone()
    tracked = int(layer.norm.num_batches_tracked) if kind is ConvNormAct else 0
    code = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    train_step(code, optimizer, (inputs, labels))
    expected = local_step(before, update, 0.01)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    if kind is ConvNormAct:
        assert int(layer.norm.num_batches_tracked) == tracked + 1
    public = lowcal.hebbian_update(plain, a, plain(a))
    plain.weight.data.copy_(before)
    layer.weight.data.copy_(before)
    torch.testing.assert_close(lowcal.hebbian_update(layer, inputs, layer(inputs)), public, rtol=1e-4, atol=1e-4)


def test_hebbian_update_of_such_a_class_changes_nothing_in_it():
    layer = ConvNormAct(2, 4, 3, padding=1)
    inputs = images(1)[0][0]
    outputs = layer(inputs)
    before, state = weights(layer), torch.get_rng_state()
    lowcal.hebbian_update(layer, inputs, outputs)
    assert not changed(before, layer)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rule", [lowcal.Frozen(), lowcal.Hebbian()], ids=["frozen", "hebbian"])
def test_random_numbers_do_not_depend_on_the_rule(rule):
    torch.manual_seed(0)
    model = nn.Sequential(DropLinear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = sgd(model)
    control(model, optimizer=optimizer, rule=rule, example_inputs=vectors(1)[0][0]).move_to(1)
    train_step(model, optimizer, vectors(1)[0])
    drawn = torch.rand(1)
    torch.manual_seed(0)
    model = nn.Sequential(DropLinear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    train_step(model, sgd(model), vectors(1)[0])
    assert torch.equal(drawn, torch.rand(1))


def test_a_class_whose_product_is_not_with_its_weight_is_refused_by_name():
    inputs = images(1)[0][0]
    model = own_network(Standardised(2, 4, 3, padding=1))
    model(inputs)
    with pytest.raises(lowcal.LowcalError, match=r"layer '0' cannot learn locally: Standardised .* 0 products"):
        control(model, example_inputs=inputs)
    with pytest.raises(lowcal.LowcalError, match="Standardised has a forward of its own"):
        lowcal.hebbian_update(model[0], inputs, model[0](inputs))


def test_a_forward_replaced_on_the_object_itself():
    """As Accelerate and others do."""
    results = []
    for replaced in (False, True):
        torch.manual_seed(0)
        model = mlp()
        if replaced:
            forward = model.one.forward
            model.one.forward = lambda *args, forward=forward: forward(*args) * 1.0
        optimizer = sgd(model)
        control(model, optimizer=optimizer, example_inputs=vectors(1)[0][0]).move_to(2)
        train_step(model, optimizer, vectors(1)[0])
        results.append(weights(model))
    assert same(*results)
