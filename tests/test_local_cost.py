"""What a boundary saves: no tensor of the prefix is kept for backward, and the work is that of docs/method.md."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowcal

from .networks import Residual, convnet, images
from .support import sgd, train_step


class Saved:
    """Bytes that autograd keeps, before and after the forward pass enters the module `transition`."""

    def __init__(self, transition):
        self.before = self.after = 0
        self.entered = False
        self.transition = transition

    def __enter__(self):
        self.hook = self.transition.register_forward_pre_hook(lambda *_: setattr(self, "entered", True))
        self.saving = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.saving.__enter__()
        return self

    def __exit__(self, *exception):
        self.saving.__exit__(*exception)
        self.hook.remove()

    def pack(self, tensor):
        size = tensor.numel() * tensor.element_size()
        if self.entered:
            self.after += size
        else:
            self.before += size
        return tensor


@pytest.mark.parametrize("rule", [lowcal.Hebbian(), lowcal.Frozen()], ids=["hebbian", "frozen"])
@pytest.mark.parametrize("norm_stats", ["batch", "running"])
@pytest.mark.parametrize("network", [convnet, Residual])
def test_autograd_saves_no_tensor_of_the_prefix(network, norm_stats, rule):
    model = network()
    optimizer = sgd(model)
    inputs, labels = images(1)[0]
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=rule, norm_stats=norm_stats, example_inputs=inputs)
    modules = dict(model.named_modules())
    for boundary in range(len(local.layers)):
        local.move_to(boundary)
        with Saved(modules[local.layers[boundary]]) as saved:
            loss = nn.functional.cross_entropy(model(inputs), labels)
        assert saved.after > 0
        # before anything is local only what is normalised or activated ahead of the first layer is kept
        assert saved.before == 0 or boundary == 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("boundary", [1, 2, 3])
def test_what_passes_through_the_prefix_is_freed_during_forward(boundary):
    model = convnet(inplace=False)
    optimizer = sgd(model)
    inputs, labels = images(1)[0]
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=inputs)
    local.move_to(boundary)
    alive = []
    for module in list(model)[: 3 * boundary - 1]:  # the last activation is the transition layer's input
        module.register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    loss = nn.functional.cross_entropy(model(inputs), labels)
    gc.collect()
    assert len(alive) == 3 * boundary - 1
    assert not any(reference() is not None for reference in alive)
    loss.backward()


def plain_convs():
    """Three convolutions and a linear layer on (N, 2, 6, 6), and the FLOPs of each one's forward pass for N = 5."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip
    products = (36 * 4 * 2 * 9, 36 * 4 * 4 * 9, 4 * 6 * 4 * 9, 24 * 3)
    return model, [2 * 5 * product for product in products]


def flops(model, optimizer, batch):
    with FlopCounterMode(display=False) as counter:
        train_step(model, optimizer, batch)
    return counter.get_total_flops()


# docs/method.md, "Speed-up": SGD 3 per layer, 2 where the input needs no gradient; local 2; frozen 1
@pytest.mark.parametrize(("rule", "share"), [(lowcal.Hebbian(), 2), (lowcal.Frozen(), 1)], ids=["hebbian", "frozen"])
def test_flops_are_those_of_the_method(rule, share):
    model, layers = plain_convs()
    optimizer = sgd(model)
    batch = images(1)[0]
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=rule, example_inputs=batch[0])
    for boundary in range(4):
        local.move_to(boundary)
        expected = share * sum(layers[:boundary]) + 2 * layers[boundary] + 3 * sum(layers[boundary + 1 :])
        assert flops(model, optimizer, batch) == expected


def test_flops_of_a_residual_network():
    """A shortcut whose input comes from the prefix needs no gradient for it either."""
    model = Residual()
    optimizer = sgd(model)
    batch = images(1)[0]
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=batch[0])
    stem, first, second, shortcut, middle, head = (
        2 * 5 * n for n in (36 * 3 * 2 * 9, 9 * 4 * 3 * 9, 9 * 4 * 4 * 9, 9 * 4 * 3, 9 * 4 * 4 * 9, 4 * 3)
    )
    expected = {
        # input_norm comes first and learns at boundary 0, so that even the stem propagates an error
        0: 3 * (stem + first + second + shortcut + middle + head),
        1: 2 * (stem + first + shortcut) + 3 * (second + middle + head),
        2: 2 * (stem + first + second + shortcut) + 3 * (middle + head),
        3: 2 * (stem + first + second + shortcut) + 3 * (middle + head),
        4: 2 * (stem + first + second + shortcut + middle) + 3 * head,
        5: 2 * (stem + first + second + shortcut + middle + head),
    }
    for boundary, total in expected.items():
        local.move_to(boundary)
        assert flops(model, optimizer, batch) == total, boundary


def test_flops_between_the_steps_that_make_updates():
    model, layers = plain_convs()
    optimizer = sgd(model)
    batch = images(1)[0]
    local = lowcal.LoCal(model, optimizer, epochs=9, rule=lowcal.Hebbian(every=3), example_inputs=batch[0])
    local.move_to(2)
    rest = 2 * layers[2] + 3 * layers[3]
    found = sorted(flops(model, optimizer, batch) - rest for _ in range(6))
    assert found == [sum(layers[:2])] * 4 + [2 * sum(layers[:2])] * 2


def test_evaluation_costs_a_forward_pass():
    model, layers = plain_convs()
    local = lowcal.LoCal(model, sgd(model), epochs=9, example_inputs=images(1)[0][0])
    local.move_to(3)
    for evaluating in (True, False):
        model.train(not evaluating)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(evaluating):
            model(images(1)[0][0])
        assert counter.get_total_flops() == sum(layers)
