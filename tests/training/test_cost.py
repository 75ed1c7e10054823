import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowcal import dry_run
from lowcal.method_settings import LocalSettings, ScheduleSettings
from lowcal.methods import METHODS, build_method
from lowcal.models import build_model
from lowcal.steps.modes import build_step
from lowcal.steps.step import StepOptions
from lowcal.training.cost import dry_cost, flop_counter, held_bytes

from ..networks import convnet
from ..support import same, sgd, snapshot
from .runs import OTHER_SETTINGS

CPU = torch.device("cpu")
SHAPES = {"chain": (4, 2, 6, 6), "grouped": (4, 2, 6, 6), "resnet8": (3, 1, 8, 8), "resnet18": (2, 3, 32, 32)}


def chain():
    """Four layers, each the only one that reads the one before."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def network(name):
    if name == "chain":
        return chain()
    if name == "grouped":
        return convnet()
    return build_model(name, classes=10, in_channels=SHAPES[name][1], width=4)


def built(name, method, boundary=0, precision="float32", **settings):
    model = network(name)
    optimizer = sgd(model)
    local = LocalSettings(schedule=ScheduleSettings(name="fixed", epochs={}), **settings)
    own = OTHER_SETTINGS.get(METHODS[method].section, local)
    attached = build_method(method, model, optimizer, own, epochs=2, example_inputs=torch.zeros(SHAPES[name]))
    attached.move_to(boundary)
    return model, optimizer, attached


def real_step(name, model, optimizer, method, precision="float32"):
    """FLOPs of a real step as torch counts them, and by layer (its forward FLOPs, whether its input has a gradient)."""
    layers = {}

    def watch(layer):
        def hook(module, inputs, outputs):
            per_output = math.prod(module.weight.shape[1:])
            layers[layer] = 2 * outputs.numel() * per_output, inputs[0].requires_grad

        return hook

    handles = [model.get_submodule(layer).register_forward_hook(watch(layer)) for layer in method.layers]
    model.train()
    step = build_step("eager", model, (optimizer,), method, StepOptions(CPU, precision))
    images = torch.randn(SHAPES[name])
    with FlopCounterMode(display=False) if name != "grouped" else flop_counter() as counter:
        step(images, torch.arange(len(images)) % 3)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops(), layers


def arithmetic(layers, boundary, share):
    """docs/method.md: SGD 3 per layer, 2 where the input needs no gradient; `share` for those before the boundary."""
    total = 0
    for index, (forward, has_gradient) in enumerate(layers.values()):
        total += forward * (share if index < boundary else 3 if has_gradient else 2)
    return total


@pytest.mark.parametrize(("method", "share"), [("sgd", 3), ("local", 2), ("freeze", 1)])
@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        ("chain", 0),
        ("chain", 1),
        ("chain", 3),
        ("grouped", 0),
        ("grouped", 2),
        ("resnet8", 0),
        ("resnet8", 4),
        ("resnet8", 9),
        ("resnet18", 11),
    ],
)
def test_flops_are_those_of_a_real_step_and_of_the_arithmetic(name, boundary, method, share):
    if method == "sgd":
        boundary = 0
    model, optimizer, attached = built(name, method, boundary)
    counted, layers = real_step(name, model, optimizer, attached)
    assert list(layers) == list(attached.layers)
    cost = dry_cost(attached, SHAPES[name])
    assert cost.flops == counted
    assert cost.flops == arithmetic(layers, boundary, share)


def test_in_a_chain_the_first_layer_and_the_transition_layer_have_no_input_gradient():
    for boundary in range(4):
        model, optimizer, method = built("chain", "local", boundary)
        _, layers = real_step("chain", model, optimizer, method)
        assert [has for _, has in layers.values()] == [index > boundary for index in range(4)]


@pytest.mark.parametrize(("precision", "method"), [("bf16", "sgd"), ("fp16", "local")])
def test_mixed_precision_takes_the_same_flops_and_less_memory(precision, method):
    boundary = 4 if method == "local" else 0
    model, optimizer, attached = built("resnet8", method, boundary)
    cost = dry_cost(attached, SHAPES["resnet8"], precision=precision)
    assert cost.flops == real_step("resnet8", model, optimizer, attached, precision)[0]
    large = (64, *SHAPES["resnet8"][1:])
    single, mixed = (dry_cost(attached, large, precision=p).peak_bytes for p in ("float32", precision))
    assert 0.4 * single < mixed < 0.8 * single


def test_updates_now_and_then_cost_their_share():
    model, optimizer, method = built("chain", "local", 2, every=4)
    _, layers = real_step("chain", model, optimizer, method)
    assert dry_cost(method, SHAPES["chain"]).flops == round(arithmetic(layers, 2, 1.25))


@pytest.mark.parametrize("batch_norm", [torch.ops.aten.native_batch_norm, torch.ops.aten._native_batch_norm_legit])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_shortcuts_give_the_shapes_and_types_of_the_real_operations(batch_norm, is_training, dtype, affine):
    def form(tensors):
        return [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]

    images = torch.randn(4, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    ones, zeros = torch.ones(3), torch.zeros(3)
    weight, bias = (ones, zeros) if affine else (None, None)
    arguments = (images, weight, bias, zeros, ones, is_training, 0.1, 1e-5)
    outputs = batch_norm.default(*arguments)
    assert form(dry_run._SHORTCUTS[batch_norm.default](*arguments)) == form(outputs)
    backward = torch.ops.aten.native_batch_norm_backward.default
    mask = [True, affine, False]
    arguments = (images, images, weight, zeros, ones, *outputs[1:], is_training, 1e-5, mask)
    given = form(dry_run._SHORTCUTS[backward](*arguments))
    real = form(backward(*arguments))
    assert given[: 1 + affine] == real[: 1 + affine]


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_changes_nothing(name):
    model, optimizer, method = built("resnet8", name)
    real_step("resnet8", model, optimizer, method)
    before = snapshot(model, optimizer), method.state_dict()
    for precision in ("float32", "bf16") if name == "local" else ("float32",):
        dry_cost(method, SHAPES["resnet8"], precision=precision)
    assert same((snapshot(model, optimizer), method.state_dict()), before)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("needs", [False, True])
def test_products_of_convolutions_are_counted_by_hand(kind, groups, needs):
    layer = kind(4, 8, 3, stride=2, groups=groups)
    inputs = torch.randn(3, 4, *[9] * (layer.weight.dim() - 2), requires_grad=needs)
    with flop_counter() as counter:
        outputs = layer(inputs)
        outputs.sum().backward()
    # Each weight meets each position of what it slides over, in a multiplication and an addition.
    over = inputs if kind is nn.ConvTranspose2d else outputs
    positions = over.numel() // over.shape[1]
    assert counter.get_total_flops() == 2 * layer.weight.numel() * positions * (3 if needs else 2)


@pytest.mark.parametrize(("decay", "copies"), [(0.0, 3), (0.1, 4)])
def test_memory_of_weights_is_counted_by_hand(decay, copies):
    """Weight, gradient and momentum; with weight decay the optimizer makes one gradient more."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    method = build_method("sgd", model, optimizer, LocalSettings(), epochs=1, example_inputs=torch.zeros(1, 1000))
    assert dry_cost(method, (1, 1000)).peak_bytes == pytest.approx(copies * 4e6, rel=0.01)


def test_memory_of_activations_lies_in_the_bounds_of_what_autograd_keeps():
    model, _, method = built("resnet18", "sgd")
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    shape = (32, *SHAPES["resnet18"][1:])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(shape)).sum()
    del loss
    peak = dry_cost(method, shape).peak_bytes
    largest = 4 * 32 * 4 * 32 * 32
    assert sum(kept.values()) < peak < sum(kept.values()) + 6 * largest


def test_memory_falls_with_the_boundary():
    peaks = []
    for boundary in (0, 4, 8, 12):
        _, _, method = built("resnet18", "freeze", boundary)
        peaks.append(dry_cost(method, (32, 3, 32, 32)).peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.5 * peaks[0]


def test_a_dry_run_leaves_nothing_alive():
    _, _, method = built("chain", "local", 2)
    first = dry_cost(method, SHAPES["chain"])
    assert all(dry_cost(method, SHAPES["chain"]) == first for _ in range(3))


def test_what_a_network_and_its_optimizer_hold():
    model = nn.Linear(10, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert held_bytes(model, optimizer) == 200
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert held_bytes(model, optimizer) == 600
    optimizer.zero_grad(set_to_none=True)
    assert held_bytes(model, optimizer) == 400
