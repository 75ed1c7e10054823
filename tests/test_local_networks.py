"""torchvision's networks: layers in execution order, followers, and a prefix that autograd does not know of.

On the meta device, where reading a value from the device is an error: a step that waited for one would fail here.
"""

import functools

import pytest
import torch
import torchvision
from torch import nn
from torch.optim import SGD

import lowcal

LAYERS = (nn.Linear, nn.Conv2d)
# Networks of different kinds -> (input size, options)
NETWORKS = {
    "resnet18": (32, {}),
    "mobilenet_v2": (32, {}),  # depthwise convolutions
    "convnext_tiny": (32, {}),  # LayerNorm, layer scale
    "vit_b_16": (224, {}),  # attention
    "googlenet": (64, {"init_weights": False}),  # branches, auxiliary classifiers
    "densenet121": (32, {}),  # concatenation
}


def build(name, device="meta", **options):
    size, settings = NETWORKS[name]
    with torch.device(device):
        model = torchvision.models.get_model(name, num_classes=10, **settings, **options)
        return model, torch.zeros(2, 3, size, size)


@functools.cache
def executed(name):
    """Layers by hooks alone, and for each parameter the layers that had begun when its module began."""
    model, inputs = build(name)
    order, owners = [], {}
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)):

            def enter(module, _, path=path):
                if isinstance(module, LAYERS):
                    order.append(path)
                owners.setdefault(path, len(order))

            module.register_forward_pre_hook(enter)
    model(inputs)
    return tuple(order), owners


def loss_of(output):
    outputs = output if isinstance(output, tuple) else (output,)  # with auxiliary classifiers
    return sum(o.square().mean() for o in outputs if o is not None)


def since(name):
    """For each parameter the boundary from which on it learns no more, by docs/method.md's rule for followers."""
    model, _ = build(name)
    order, owners = executed(name)
    begun = {}
    for key, _ in model.named_parameters():
        owner = key.rpartition(".")[0]
        if owner in order:
            begun[key] = order.index(owner) + 1
        elif isinstance(model.get_submodule(owner), nn.modules.batchnorm._NormBase | nn.LayerNorm):
            begun[key] = max(owners[owner], 1)
        else:
            begun[key] = special(name, key, order)
    return begun


def special(name, key, order):
    """Parameters of composite modules, followed by hand through torchvision's sources."""
    if name == "convnext_tiny":  # CNBlock: layer_scale * block(x), the block's last layer is its second linear one
        return order.index(key.replace("layer_scale", "block.5")) + 1
    if key in ("class_token", "encoder.pos_embedding"):  # after the patches' convolution
        return 1
    # ViT's attention runs before the block's two linear layers, as products of weights and not as modules
    assert "self_attention" in key
    return order.index(key.partition("self_attention")[0] + "mlp.0")


def boundaries(name, layers):
    """The first layer alone, inside a block, and for the smallest network more."""
    return [0, 1, layers // 3, layers - 1] if name == "resnet18" else [2 * layers // 3]


@pytest.mark.parametrize("name", [*list(NETWORKS)[:-1], pytest.param("densenet121", marks=pytest.mark.slow)])
def test_network(name):
    model, inputs = build(name)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=inputs)
    order, _ = executed(name)
    assert local.layers == order
    follows = since(name)
    saved, entered = [], []

    def pack(tensor):
        if not entered:
            saved.append(tensor.shape)
        return tensor

    for boundary in boundaries(name, len(order)):
        local.move_to(boundary)
        saved.clear()
        entered.clear()
        handle = model.get_submodule(order[boundary]).register_forward_pre_hook(lambda *_: entered.append(1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model(inputs))
        handle.remove()
        assert entered
        if boundary:
            assert saved == []
        learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == {key for key, start in follows.items() if boundary < start}
        optimizer.zero_grad()
        loss.backward()
        with_gradient = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient == learning
        versions = {key: parameter._version for key, parameter in model.named_parameters()}
        optimizer.step()
        written = {key for key, parameter in model.named_parameters() if parameter._version > versions[key]}
        assert written == learning | {f"{layer}.weight" for layer in order[:boundary]}


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_network_with_values(name):
    """The same by numbers: after a step only what should move has moved, and all of it has."""
    torch.manual_seed(0)
    model, _ = build(name, device="cpu")
    inputs = torch.randn(2, 3, max(NETWORKS[name][0], 64), max(NETWORKS[name][0], 64))
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=inputs)
    order, _ = executed(name)
    boundary = len(order) // 2
    loss_of(model(inputs)).backward()
    optimizer.step()
    local.move_to(boundary)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer.zero_grad()
    loss_of(model(inputs)).backward()
    optimizer.step()
    follows = since(name)
    for key, value in model.named_parameters():
        layer = key.rpartition(".")[0]
        if key.endswith("weight") and layer in order[:boundary]:
            assert float((value.detach() - before[key]).norm()) == pytest.approx(0.01, rel=1e-3)
        else:
            assert torch.equal(value, before[key]) is (boundary >= follows[key]), key
    assert int(local._local_layers.updates.skipped) == 0


def test_the_shortcut_of_a_residual_block_runs_last():
    order, _ = executed("resnet18")
    assert order[:9] == (
        "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2",
        "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv1",
    )  # fmt: skip


def test_attention_that_is_local_from_the_middle_of_a_block():
    """Between a block's two linear layers: its attention, which ran before both, learns no more; its second does."""
    model, inputs = build("vit_b_16")
    optimizer = SGD(model.parameters(), lr=0.1)
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=inputs)
    local.move_to(1)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    block = "encoder.layers.encoder_layer_0."
    assert frozen == {
        "conv_proj.weight", "conv_proj.bias", "class_token", "encoder.pos_embedding",
        *(f"{block}{name}" for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")),
        *(f"{block}self_attention.out_proj.{kind}" for kind in ("weight", "bias")),
        *(f"{block}self_attention.in_proj_{kind}" for kind in ("weight", "bias")),
    }  # fmt: skip
