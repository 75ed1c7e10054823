import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.ops import StochasticDepth

import lowcal
from lowcal import Fixed, Frozen, LoCal, LowcalError, drop_path, make_step, save_drop_path
from lowcal.steps import graphed

from .steps.software_graphs import SoftwareGraphs
from .support import hooks, same, sgd, train_step, weights


def convnext(rate=0.5):
    settings = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 2)]
    model = ConvNeXt(settings, stochastic_depth_prob=rate, layer_scale=0.5, num_classes=3)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = rate
    return model


def swin(rate=0.5, **options):
    arguments = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": [4, 4]}
    model = SwinTransformer(**arguments, **options, num_classes=3, stochastic_depth_prob=rate)
    model.features[1][0].stochastic_depth.p = rate
    return model


def efficientnet(rate=0.5, **options):
    settings = [FusedMBConvConfig(2, 3, 1, 8, 8, 2), MBConvConfig(2, 3, 2, 8, 12, 2)]
    model = EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.1, num_classes=3, last_channel=8, **options)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = rate
    return model


def timm_model(path, rate=0.5, **options):
    pytest.importorskip("timm")
    from timm import models

    family, _, name = path.rpartition(".")
    model = getattr(getattr(models, family), name)(num_classes=3, drop_path_rate=rate, **options)
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = rate
    return model


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12), "output_stride": 8, "ls_init_value": 0.5}
LAYER_NORM = {
    "convnext": convnext,
    "swin": swin,
    "swin v2": partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "timm convnext": partial(timm_model, "convnext.ConvNeXt", **TIMM_CONVNEXT),
    "timm convnext conv": partial(timm_model, "convnext.ConvNeXt", **TIMM_CONVNEXT, conv_mlp=True),
    "timm vit": partial(timm_model, "vision_transformer.VisionTransformer", **VIT),
    "timm vit layer scale": partial(timm_model, "vision_transformer.VisionTransformer", init_values=0.5, **VIT),
    "timm swin": partial(
        timm_model, "swin_transformer.SwinTransformer", img_size=16, patch_size=2, embed_dim=8, depths=(3,),
        num_heads=(2,), window_size=4,
    ),
    "timm beit": partial(timm_model, "beit.Beit", init_values=0.5, **VIT),
    "timm mixer": partial(
        timm_model, "mlp_mixer.MlpMixer", img_size=16, patch_size=4, embed_dim=12, num_blocks=3,
    ),
}  # fmt: skip
BATCH_NORM = {
    "efficientnet": efficientnet,
    "timm mobilenetv3": partial(timm_model, "mobilenetv3.mobilenetv3_small_050"),
    "timm mobilenetv4": partial(timm_model, "mobilenetv3.mobilenetv4_conv_small_035"),
    "timm edge": partial(timm_model, "efficientnet.efficientnet_es"),
    "timm regnet": partial(timm_model, "regnet.regnetx_002"),
    "timm resnet basic": partial(timm_model, "resnet.resnet10t"),
    "timm resnet": partial(timm_model, "resnet.resnet26"),
}
ALL = LAYER_NORM | BATCH_NORM
network = pytest.mark.parametrize("name", LAYER_NORM)


class Masked(nn.Module):
    """The reference: computes the branch of every sample, then multiplies it by a draw."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        kept = (torch.rand(len(x)) >= self.rate).to(x) / max(1 - self.rate, 1e-9)
        return x * kept.view(-1, *[1] * (x.dim() - 1)) if self.training else x


def masked(model, rate=0.5):
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for child, inner in list(module.named_children()):
            if type(inner).__name__ in ("DropPath", "StochasticDepth"):
                setattr(module, child, Masked(rate))
    return model


def images(size=6, seed=0):
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def passed(model, batch, seed):
    """The output in training mode and all gradients; batch normalisation uses its running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(batch)
    output.square().sum().backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ALL)
def test_the_output_and_gradients_are_those_of_masked_branches(name):
    model = ALL[name]().double()
    reference = masked(model)
    saved = save_drop_path(model, allow_batch_norm=name in BATCH_NORM)
    assert len(saved.blocks) >= 2
    for seed in range(2):
        output, gradients = passed(model, images().double(), seed)
        expected_output, expected_gradients = passed(reference, images().double(), seed)
        torch.testing.assert_close(output, expected_output, rtol=1e-8, atol=1e-10)
        for key, expected in expected_gradients.items():
            torch.testing.assert_close(gradients[key], expected, rtol=1e-7, atol=1e-8)


class Sizes:
    """The number of samples that each branch's first layer gets, in a list for each block."""

    def __init__(self, model):
        self.of = {}
        for name, module in model.named_modules():
            if type(module).__name__ in ("CNBlock", "ConvNeXtBlock"):
                first = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
                first.register_forward_hook(lambda _, inputs, __, name=name: self.of.setdefault(name, []).append(
                    len(inputs[0])
                ))  # fmt: skip


@network
@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 4])
def test_at_rates_0_and_1_nothing_is_random(name, rate, size):
    model = LAYER_NORM[name]()
    for module in model.modules():
        for attribute in ("p", "drop_prob"):
            if type(module).__name__ in ("StochasticDepth", "DropPath") and hasattr(module, attribute):
                setattr(module, attribute, rate)
    plain = copy.deepcopy(model)
    with save_drop_path(model):
        output, gradients = passed(model, images(size), seed=1)
    expected_output, expected_gradients = passed(plain, images(size), seed=1)
    assert same(output, expected_output)
    if rate == 0:
        assert same(gradients, expected_gradients)
    for key, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[key], expected, rtol=1e-5, atol=1e-6)


def test_branches_compute_the_kept_samples_alone_and_one_if_there_are_none():
    model = convnext(rate=1.0).train()
    save_drop_path(model)
    sizes = Sizes(model)
    model(images(5))
    assert list(sizes.of.values()) == [[1]] * 4
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.4
    sizes.of.clear()
    with torch.no_grad():
        for _ in range(300):
            model(images(5))
    for counts in sizes.of.values():
        assert sum(counts) / 1500 == pytest.approx(0.6, abs=0.06)  # 4.7 standard errors
        assert set(counts) == {1, 2, 3, 4, 5}


def kept_samples(mode, size, rounds):
    """Which samples a block with a rate of 0.3 keeps, (rounds, size)."""
    torch.manual_seed(0)
    block = CNBlock(2, 0.5, 0.3).train()
    block.stochastic_depth.mode = mode
    save_drop_path(block)
    x = torch.randn(1, 2, 1, 1).expand(size, -1, -1, -1)
    with torch.no_grad():
        return torch.stack([(block(x) - x).flatten(1).any(1) for _ in range(rounds)]).double()


def test_samples_are_kept_as_often_as_they_should_and_independently():
    kept = kept_samples("row", size=4, rounds=1500)
    assert kept.mean(0).tolist() == pytest.approx([0.7] * 4, abs=4 * (0.21 / 1500) ** 0.5)
    # The correlations of independent draws have the standard deviation 1 / sqrt(rounds), also with the draw before.
    between = torch.corrcoef(kept.T) - torch.eye(4, dtype=torch.double)
    assert between.abs().max() < 4 / 1500**0.5
    assert torch.corrcoef(torch.stack([kept[1:, 0], kept[:-1, 0]]))[0, 1].abs() < 4 / 1500**0.5


def test_in_mode_batch_all_samples_share_the_draw():
    kept = kept_samples("batch", size=3, rounds=400)
    assert same(kept[:, 0], kept[:, 1]) and same(kept[:, 0], kept[:, 2])
    assert float(kept.mean()) == pytest.approx(0.7, abs=4 * (0.21 / 400) ** 0.5)


@pytest.mark.parametrize("name", ["convnext", "swin", "timm vit"])
def test_the_mean_output_is_that_of_the_models_own_drop_path(name):
    torch.manual_seed(0)
    model = LAYER_NORM[name](rate=0.4).train()
    batch = images(1).expand(1500, -1, -1, -1)
    with torch.no_grad():
        own = model(batch).double()
        save_drop_path(model)
        ours = model(batch).double()
    error = ((own.var(0) + ours.var(0)) / 1500).sqrt()
    assert ((own.mean(0) - ours.mean(0)).abs() < 4 * error).all()
    assert (ours.var(0) / own.var(0)).log().abs().max() < 0.3


def test_kept_samples_are_not_scaled_where_the_model_does_not():
    model = timm_model("convnext.ConvNeXt", **TIMM_CONVNEXT)
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.scale_by_keep, module.drop_prob = False, 0.999
    eval_output = model.eval()(images())
    dropped = copy.deepcopy(model)
    for module in dropped.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 1.0
    with save_drop_path(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda count, device: torch.ones(count))
        torch.testing.assert_close(model.train()(images()), eval_output)


@network
def test_evaluation_is_bitwise_the_same_and_detach_restores_training(name):
    model = LAYER_NORM[name]()
    plain = copy.deepcopy(model)
    before, keys, classes = hooks(model, sgd(model)), list(model.state_dict()), [type(m) for m in model.modules()]
    with save_drop_path(model) as saved:
        model.train()(images())
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        assert all(module.training for module in model.modules())
        assert same(model.eval()(images()), plain.eval()(images()))
    assert hooks(model, sgd(model)) == before
    saved.detach()  # twice does no harm
    output, gradients = passed(model, images(), seed=3)
    expected_output, expected_gradients = passed(plain, images(), seed=3)
    assert same(output, expected_output) and same(gradients, expected_gradients)


def test_it_stays_without_the_handle_and_its_copies_have_their_own_drop_path():
    model = convnext(rate=1.0)
    save_drop_path(model)
    sizes = Sizes(model)
    model.train()(images(4))
    assert list(sizes.of.values()) == [[1]] * 4
    plain = convnext(rate=1.0)
    plain.load_state_dict(model.state_dict())
    sizes = Sizes(plain)
    expected = plain.train()(images(4))
    saved = convnext()
    save_drop_path(saved)
    for copied in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        copied.load_state_dict(model.state_dict())
        for module in copied.modules():
            if isinstance(module, StochasticDepth):
                module.p = 1.0
        sizes = Sizes(copied)
        assert same(copied.train()(images(4)), expected)
        assert list(sizes.of.values()) == [[4]] * 4
        save_drop_path(copied)  # not refused


def test_under_autocast_it_is_the_masked_network():
    model = convnext()
    reference = masked(model)
    save_drop_path(model)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = passed(model, images(), seed=2)
        expected_output, expected_gradients = passed(reference, images(), seed=2)
    torch.testing.assert_close(output, expected_output, rtol=0.05, atol=0.05)
    for key, expected in expected_gradients.items():
        assert (gradients[key] - expected).norm() <= 0.05 * expected.norm() + 1e-3


def test_checkpointed_blocks_draw_the_same_samples_again():
    model = convnext()
    checkpointed = copy.deepcopy(model)
    for stage in (1, 3):
        for block in checkpointed.features[stage]:
            block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)
    save_drop_path(model), save_drop_path(checkpointed)
    output, gradients = passed(model, images(), seed=5)
    again_output, again_gradients = passed(checkpointed, images(), seed=5)
    assert same(output, again_output) and same(gradients, again_gradients)


def test_channels_last_stays_channels_last():
    model = convnext().to(memory_format=torch.channels_last).train()
    save_drop_path(model)
    formats = []
    for module in model.modules():
        if type(module).__name__ == "CNBlock":
            module.block[0].register_forward_hook(lambda _, inputs, output: formats.append(inputs[0]))
            module.register_forward_hook(lambda _, inputs, output: formats.append(output))
    model(images().to(memory_format=torch.channels_last))
    assert len(formats) == 8
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in formats)


@pytest.mark.parametrize("name", ["convnext", "timm vit"])
def test_with_frozen_layers_the_rest_learns_as_under_masked_branches(name):
    ends = []
    model = LAYER_NORM[name]()
    for trained, saves in ((copy.deepcopy(model), True), (masked(model), False)):
        if saves:
            save_drop_path(trained)
        trained_locally(trained, Frozen())
        ends.append(weights(trained))
    for key, expected in ends[1].items():
        torch.testing.assert_close(ends[0][key], expected, rtol=1e-3, atol=1e-5)


def trained_locally(model, rule):
    """Trains two epochs; the first layers are local in the second. Returns their names, and the weights before the second epoch."""
    optimizer = sgd(model)
    local = LoCal(model, optimizer, epochs=2, rule=rule, schedule=Fixed({1: 4}), example_inputs=images())
    torch.manual_seed(1)
    for _ in range(2):
        before = weights(model)
        for seed in range(2):
            loss = train_step(model.train(), optimizer, (images(seed=seed), torch.tensor([0, 1, 2, 0, 1, 2])))
        local.end_epoch(float(loss))
    return local.layers[: local.boundary], before


def test_local_layers_learn_from_the_kept_samples():
    model = convnext()
    save_drop_path(model)
    layers, before = trained_locally(model, lowcal.Hebbian(lr=0.01))
    assert len(layers) == 4
    moved = {key for key, value in before.items() if not same(value, model.state_dict()[key])}
    assert {f"{layer}.weight" for layer in layers} <= moved
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_batch_normalisation_is_refused_unless_it_is_accepted():
    model = efficientnet()
    before = hooks(model, sgd(model))
    with pytest.raises(LowcalError, match="'features.1.0' has batch normalisation, .*allow_batch_norm=True"):
        save_drop_path(model)
    assert hooks(model, sgd(model)) == before
    save_drop_path(model, allow_batch_norm=True)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 1.0
    for size in (2, 3):  # two samples: one would be too few where an image is one pixel
        model.train()(torch.randn(size, 3, 2, 2))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    save_drop_path(efficientnet(norm_layer=partial(nn.GroupNorm, 1)))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), StochasticDepth(0.5, "row")

    def forward(self, x):
        return x + self.drop(self.fc(x))


class TwiceBlock(CNBlock):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "Sequential has no drop path"),
        (nn.Sequential(Unknown()), r"does not know the block '0', a tests.test_drop_path.Unknown"),
        (nn.Sequential(TwiceBlock(4, 0.5, 0.5)), r"does not know the block '0', a tests.test_drop_path.TwiceBlock"),
        ("convnext", "the model is str"),
        (nn.DataParallel(convnext()), "DataParallel"),
        (torch.compile(convnext(), backend="eager"), "compiled"),
    ],
)
def test_networks_that_it_cannot_handle_are_refused_by_name(model, message):
    with pytest.raises(LowcalError, match=message):
        save_drop_path(model)


def test_a_second_call_is_refused():
    model = convnext()
    saved = save_drop_path(model)
    with pytest.raises(LowcalError, match="already"):
        save_drop_path(model)
    saved.detach()
    save_drop_path(model)


def test_a_mask_is_refused_in_training():
    model = LAYER_NORM["timm vit"]()
    save_drop_path(model)
    x, mask = torch.randn(4, 16, 12), torch.zeros(4, 1, 16, 16)
    with pytest.raises(LowcalError, match="the block 'blocks.1' got a second tensor"):
        model.train().blocks[1](x, attn_mask=mask)
    model.eval().blocks[1](x, attn_mask=mask)


def test_recorded_and_compiled_steps_are_refused(monkeypatch):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    model = convnext()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    loss = nn.functional.cross_entropy
    saved = save_drop_path(model)
    for mode in ("graphed", "compiled", "graphed-compiled"):
        with pytest.raises(LowcalError, match="cannot run a network under save_drop_path"):
            make_step(model, optimizer, loss, mode=mode)
    assert make_step(model, optimizer, loss, mode="eager")(images(), torch.zeros(6, dtype=torch.long)).isfinite()
    saved.detach()
    make_step(model, optimizer, loss, mode="graphed")


def test_compiled_and_captured_passes_use_the_models_own_drop_path(monkeypatch):
    model = convnext(rate=1.0)
    save_drop_path(model)
    sizes = Sizes(model)
    monkeypatch.setattr(drop_path, "_is_captured", lambda x: True)
    model.train()(images(4))
    assert list(sizes.of.values()) == [[4]] * 4
    monkeypatch.undo()
    block = convnext(rate=0.5).features[1][0]
    save_drop_path(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x = torch.randn(64, 8, 4, 4)
    kept = (compiled(x) - x).flatten(1).any(1)
    assert 0 < kept.sum() < 64


def test_a_pass_that_fails_leaves_no_trace():
    model = convnext()
    save_drop_path(model)
    handle = model.features[1][0].block[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.train()(images())
    handle.remove()
    expected = copy.deepcopy(model).eval()(images())
    assert same(model.eval()(images()), expected)
    model.train()(images())
