import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import mobilenetv3, regnet

from lowcal import LowcalError
from lowcal.method_settings import StochasticDepthSettings
from lowcal.methods import build_method
from lowcal.methods.residual import residual_blocks
from lowcal.models import SmallResNet, build_model
from lowcal.training.cost import dry_cost, flop_counter

from ..drop_path_networks import ALL, with_rate
from ..networks import mlp
from ..support import changed, hooks, same, sgd, train_step, weights

NETWORKS = {
    "ours": lambda: SmallResNet((2, 2), classes=3, in_channels=3, width=4),
    "basic": lambda: models.ResNet(models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=3),
    "bottleneck": lambda: models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=3),
    "mobilenet": lambda: models.mobilenet_v2(width_mult=0.1, num_classes=3),
    "mobilenet v3": lambda: models.MobileNetV3(
        [mobilenetv3.InvertedResidualConfig(8, 3, 8, 8, True, "RE", 1, 1, 1)] * 2, last_channel=8, num_classes=3
    ),
    "regnet": lambda: models.RegNet(regnet.BlockParams.from_init_params(4, 8, 8.0, 2.0, 8), num_classes=3),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def batches(count, *, size=4, pixels=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, pixels, pixels, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def built(model, survival=0.5, seed=0):
    optimizer = sgd(model)
    method = build_method(
        "stochastic-depth",
        model,
        optimizer,
        StochasticDepthSettings(survival),
        epochs=3,
        example_inputs=batches(1)[0][0],
        seed=seed,
    )
    return optimizer, method


class Watched:
    """Counts the runs of each block's branch, forward and backward."""

    def __init__(self, model):
        self.blocks = residual_blocks(model)
        self.forward, self.backward = ([0] * len(self.blocks) for _ in range(2))
        for index, block in enumerate(self.blocks):
            block.lasts[0].register_forward_hook(lambda *_, index=index: self.count(self.forward, index))
            shortcut = set() if block.shortcut_name is None else {*getattr(block.module, block.shortcut_name).modules()}
            first = next(m for m in block.module.modules() if isinstance(m, nn.Conv2d) and m not in shortcut)
            first.weight.register_post_accumulate_grad_hook(lambda *_, index=index: self.count(self.backward, index))

    def count(self, counts, index):
        counts[index] += 1


@every_network
def test_a_dropped_block_runs_neither_forward_nor_backward_and_keeps_its_weights(network):
    model = NETWORKS[network]()
    optimizer, method = built(model)
    watched = Watched(model)
    model.train()
    method._fixed = tuple(index % 2 == 0 for index in range(len(watched.blocks)))
    before = weights(model)
    train_step(model, optimizer, batches(1)[0])
    assert watched.forward == watched.backward == [int(gate) for gate in method._fixed]
    moved = changed(before, model)
    for block, gate in zip(watched.blocks, method._fixed, strict=True):
        shortcut = f"{block.name}.{block.shortcut_name}."
        branch = {key for key in before if key.startswith(f"{block.name}.") and not key.startswith(shortcut)}
        assert bool(branch & moved) == gate
        if block.shortcut_name and not isinstance(getattr(block.module, block.shortcut_name), nn.Identity):
            assert any(key.startswith(shortcut) for key in moved)


def test_blocks_take_part_as_often_as_they_survive():
    model = NETWORKS["ours"]()
    _, method = built(model, survival=0.2)
    assert method.survival == pytest.approx((0.8, 0.6, 0.4, 0.2))
    watched = Watched(model)
    model.train()
    images = torch.zeros(1, 3, 4, 4)
    with torch.no_grad():
        for _ in range(1000):
            model(images)
    assert [runs / 1000 for runs in watched.forward] == pytest.approx(method.survival, abs=0.04)


def flops_with(gates, model, optimizer, method):
    """Those of a real step with these gates."""
    method._fixed = tuple(gates)
    with flop_counter() as counter:
        train_step(model, optimizer, batches(1)[0])
    method._fixed = None
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("network", "survival"),
    [("ours", 0.3), ("ours", 1.0), ("bottleneck", 0.3), pytest.param("mobilenet", 0.3, marks=pytest.mark.slow)],
)
def test_the_expected_flops_are_a_whole_step_less_each_branch_as_often_as_it_is_dropped(network, survival):
    model = NETWORKS[network]()
    optimizer, method = built(model, survival)
    cost = dry_cost(method, (4, 3, 8, 8))
    assert method._fixed is None
    model.train()
    number = len(method.survival)
    whole = flops_with([True] * number, model, optimizer, method)
    parts = [flops_with([i != dropped for i in range(number)], model, optimizer, method) for dropped in range(number)]
    dropped = sum((1 - p) * (whole - part) for p, part in zip(method.survival, parts, strict=True))
    assert cost.flops == round(whole - dropped)


def test_peak_memory_is_that_of_a_step_of_all_blocks():
    costs = [dry_cost(built(NETWORKS["ours"](), survival)[1], (64, 3, 8, 8)) for survival in (0.5, 1.0)]
    assert costs[0].peak_bytes == costs[1].peak_bytes


@every_network
def test_evaluation_scales_each_branch_by_its_survival(network):
    model = NETWORKS[network]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    scaled = copy.deepcopy(model)
    optimizer = sgd(model)
    settings = StochasticDepthSettings(0.4)
    images = batches(1)[0][0].double()
    method = build_method("stochastic-depth", model, optimizer, settings, epochs=1, example_inputs=images)
    # The last normalisation of a branch is affine, so that scaling the branch is scaling its weight and bias.
    with torch.no_grad():
        for block, probability in zip(residual_blocks(scaled), method.survival, strict=True):
            norm = block.lasts[0]
            while isinstance(norm, nn.Sequential):
                norm = norm[-1]
            norm.weight *= probability
            norm.bias *= probability
    torch.testing.assert_close(model.eval()(images), scaled.eval()(images), rtol=1e-10, atol=1e-12)


@every_network
def test_with_survival_one_it_is_bitwise_the_plain_network(network):
    model = NETWORKS[network]()
    plain = copy.deepcopy(model)
    optimizer, _method = built(model, survival=1.0)
    plain_optimizer = sgd(plain)
    for batch in batches(3):
        model.train(), plain.train()
        torch.manual_seed(4)  # MobileNetV2 has dropout
        loss = train_step(model, optimizer, batch)
        torch.manual_seed(4)
        plain_loss = train_step(plain, plain_optimizer, batch)
        assert same(loss, plain_loss)
        assert same(weights(model), weights(plain))
        with torch.no_grad():
            assert same(model.eval()(batch[0]), plain.eval()(batch[0]))
    assert same(optimizer.state_dict(), plain_optimizer.state_dict())


def test_a_fused_optimizer_takes_the_same_steps():
    """Its kernel asks for the momentum of all parameters, also of those that were never stepped."""
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = NETWORKS["ours"]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused)
        settings = StochasticDepthSettings(0.3)
        example = batches(1)[0][0]
        _method = build_method("stochastic-depth", model, optimizer, settings, epochs=1, example_inputs=example)
        for batch in batches(6):
            train_step(model.train(), optimizer, batch)
        ends.append(weights(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_it_draws_from_its_own_generator_alone():
    model = NETWORKS["ours"]()
    _, method = built(model)
    state = torch.get_rng_state()
    model.train()
    drawn = [method._gates() for _ in range(50)]
    model(batches(1)[0][0])
    assert same(torch.get_rng_state(), state)
    again = built(NETWORKS["ours"](), seed=0)[1]
    assert [again._gates() for _ in range(50)] == drawn
    other = built(NETWORKS["ours"](), seed=1)[1]
    assert [other._gates() for _ in range(50)] != drawn


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(blocks=["stages.0.0"]),
        lambda state: state.update(generator=torch.zeros(3, dtype=torch.uint8)),
        lambda state: state.pop("generator"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(spoil):
    _, method = built(NETWORKS["ours"]())
    before = method.state_dict()
    state = method.state_dict()
    spoil(state)
    with pytest.raises(LowcalError, match="stochastic-depth: the state"):
        method.load_state_dict(state)
    assert same(method.state_dict(), before)


@every_network
def test_the_network_is_untouched_between_passes_and_its_copies_are_plain(network):
    model = NETWORKS[network]()
    plain = hooks(model, sgd(model))
    optimizer, method = built(model)
    keys = list(model.state_dict())
    method._fixed = (False,) * len(method.survival)
    for batch in batches(2):
        train_step(model.train(), optimizer, batch)
        assert list(model.state_dict()) == keys
        assert not any("forward" in vars(module) for module in model.modules())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        watched = Watched(copied)
        copied.train()(batches(1)[0][0])
        assert watched.forward == [1] * len(watched.blocks)
        reference = copy.deepcopy(copied)
        method.detach()
        assert same(copied.eval()(batches(1)[0][0]), reference.eval()(batches(1)[0][0]))
    assert hooks(model, sgd(model)) == plain


def test_a_pass_that_fails_leaves_the_network_as_it_was():
    model = NETWORKS["ours"]()
    _, method = built(model)
    method._fixed = (False,) * len(method.survival)
    with pytest.raises(RuntimeError):
        model.train()(torch.zeros(1, 5, 4, 4))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("model", [build_model("vgg13", classes=3, width=2), mlp()])
def test_a_network_without_residual_blocks_is_refused(model):
    example = torch.zeros(1, 3, 32, 32)
    with pytest.raises(LowcalError, match=f"{type(model).__name__} has none that it knows; use it with a ResNet"):
        build_method("stochastic-depth", model, sgd(model), StochasticDepthSettings(), epochs=1, example_inputs=example)


def test_a_block_with_another_forward_pass_is_not_taken_for_its_parent():
    class Other(models.resnet.BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    assert residual_blocks(models.ResNet(Other, [1, 1, 1, 1])) == []


def attached(model, images):
    settings = StochasticDepthSettings(0.4)
    return build_method("stochastic-depth", model, sgd(model), settings, epochs=1, example_inputs=images)


class Passing(nn.Module):
    """A dropped block without a shortcut of its own."""

    def forward(self, x, **_):
        return x


class Scaled(nn.Module):
    """A drop path that scales, as a reference."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


FAMILIES = sorted(set(ALL) - {"timm beit", "timm mixer", "timm resnet", "timm resnet basic"})


def family(name):
    """The network without its own drop path; batch normalisation with its running statistics."""
    torch.manual_seed(0)
    model = with_rate(ALL[name](), 0.0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().train = lambda mode=True, module=module: module
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_in_other_families_a_dropped_block_is_its_shortcut(name):
    model = family(name)
    images = batches(1, pixels=16)[0][0]
    method = attached(model, images)
    gates = tuple(index % 2 == 1 for index in range(len(method.survival)))
    method._fixed = gates
    reference = copy.deepcopy(model)
    for block, gate in zip(residual_blocks(reference), gates, strict=True):
        if not gate and block.shortcut_name is None:
            parent, _, own = block.name.rpartition(".")
            setattr(reference.get_submodule(parent), own, Passing())
        elif not gate:  # a branch that computes zero
            block.lasts[0].register_forward_hook(lambda *arguments: 0 * arguments[-1])
    torch.manual_seed(0)
    output = model.train()(images)
    torch.manual_seed(0)
    torch.testing.assert_close(output, reference.train()(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_other_families_evaluation_scales_each_branch(name):
    model = family(name)
    images = batches(1, pixels=16)[0][0]
    reference = copy.deepcopy(model)
    method = attached(model, images)
    for block, probability in zip(residual_blocks(reference), method.survival, strict=True):
        for child in ("drop_path", "drop_path1", "drop_path2", "stochastic_depth"):
            if hasattr(block.module, child):
                setattr(block.module, child, Scaled(probability))
    torch.testing.assert_close(model.eval()(images), reference.eval()(images))
