import copy
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock

import lowcal
from lowcal import Fixed, Frozen, LoCal, save_drop_path

from .drop_path_networks import (
    ALL,
    BATCH_NORM,
    LAYER_NORM,
    TIMM_CONVNEXT,
    Sizes,
    convnext,
    images,
    masked,
    passed,
    timm_model,
    with_rate,
)
from .ranks import on_two_ranks
from .support import hooks, same, sgd, train_step, weights

network = pytest.mark.parametrize("name", LAYER_NORM)


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


@network
@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 4])
def test_at_rates_0_and_1_nothing_is_random(name, rate, size):
    model = with_rate(LAYER_NORM[name](), rate)
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
    with_rate(model, 0.4)
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
    assert same(kept[:, 0], kept[:, 1])
    assert same(kept[:, 0], kept[:, 2])
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
    model = timm_model("convnext.ConvNeXt", rate=0.999, **TIMM_CONVNEXT)
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.scale_by_keep = False
    eval_output = model.eval()(images())
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
    assert same(output, expected_output)
    assert same(gradients, expected_gradients)


def test_it_stays_without_the_handle_and_its_copies_have_their_own_drop_path():
    model = convnext(rate=1.0)
    save_drop_path(model)
    sizes = Sizes(model)
    model.train()(images(4))
    assert list(sizes.of.values()) == [[1]] * 4
    plain = convnext(rate=1.0)
    plain.load_state_dict(model.state_dict())
    expected = plain.train()(images(4))
    saved = convnext()
    save_drop_path(saved)
    for copied in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        copied.load_state_dict(model.state_dict())
        sizes = Sizes(with_rate(copied, 1.0))
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
    assert same(output, again_output)
    assert same(gradients, again_gradients)


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
    """The names of the layers that are local in the second of two epochs, and the weights before that epoch."""
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


def gradients_of_rank(rank, wraps):
    """Of a mini-batch of its own, with rare samples: most branches keep none."""
    torch.manual_seed(0)
    model = LAYER_NORM["swin"](rate=0.8)
    trained = DistributedDataParallel(model) if wraps else model
    save_drop_path(model)
    torch.manual_seed(rank)
    trained.train()(images(2, seed=rank)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_under_ddp_each_rank_draws_its_own_samples():
    first, second = on_two_ranks(gradients_of_rank, True)
    assert same(first, second)
    alone = [gradients_of_rank(rank, False) for rank in (0, 1)]
    for mean, own, other in zip(first, *alone, strict=True):
        torch.testing.assert_close(mean, (own + other) / 2)


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "drop-path.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    assert len(names["saved"].blocks) == 18
    assert names["loss"].isfinite()
