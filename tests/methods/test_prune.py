import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowcal import LowcalError
from lowcal.method_settings import PruneSettings
from lowcal.methods import build_method
from lowcal.models import BasicBlock, SmallResNet
from lowcal.strided import is_unsafe
from lowcal.training.cost import dry_cost

from ..support import same, sgd, train_step, weights

EVERY_EPOCH = PruneSettings(every=1)


def network(dtype=torch.float32):
    """Stem 2 -> 4; blocks 4 -> 4 and 4 -> 8, the second with a convolution as its shortcut; head."""
    torch.manual_seed(2)
    return SmallResNet((1, 1), classes=3, in_channels=2, width=4).to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 2, 6, 6, generator=generator, dtype=dtype), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def built(model, settings=EVERY_EPOCH):
    optimizer = sgd(model)
    example = batches(1, next(model.parameters()).dtype)[0][0]
    return optimizer, build_method("prune", model, optimizer, settings, epochs=4, example_inputs=example)


def zero(model, *, outputs=(), inputs=()):
    """Sets weights of (layer, channels) to zero."""
    with torch.no_grad():
        for name, channels in outputs:
            model.get_submodule(name).weight[channels] = 0
        for name, channels in inputs:
            model.get_submodule(name).weight[:, channels] = 0


STEM = {
    "outputs": ["stem.0", "stages.0.0.conv2"],
    "inputs": ["stages.0.0.conv1", "stages.1.0.conv1", "stages.1.0.shortcut.0"],
}


def zero_stem(model, channels):
    """Rids all layers that share the first stage's residual sum of some of its channels."""
    zero(model, **{kind: [(name, channels) for name in names] for kind, names in STEM.items()})


def test_the_penalty_is_the_group_lasso_over_both_sides_of_each_layer():
    model = network(torch.float64)
    _, method = built(model, PruneSettings(ratio=0.3))
    lasso = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            if name != "head":
                lasso += sum(float(channel.square().sum()) ** 0.5 for channel in weight)
            if name != "stem.0":
                lasso += sum(float(channel.square().sum()) ** 0.5 for channel in weight.transpose(0, 1))
    first = method.penalty(torch.tensor(2.0, dtype=torch.float64)).detach()
    assert float(first) / (float(first) + 2.0) == pytest.approx(0.3)
    assert float(method._coefficient) == pytest.approx(0.3 * 2.0 / (0.7 * lasso))
    # From then on the coefficient stays, whatever the loss.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    assert float(method.penalty(torch.tensor(50.0)).detach()) == pytest.approx(2 * float(first))


def test_the_penaltys_gradient_shrinks_channels_and_is_zero_where_they_are():
    model = network(torch.float64)
    zero_stem(model, [1])
    _, method = built(model)
    method.penalty(torch.tensor(1.0, dtype=torch.float64)).backward()
    weight = model.stem[0].weight  # penalised by outputs alone
    norms = weight.detach().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    expected = method._coefficient * torch.where(norms > 0, weight.detach() / norms, 0.0)
    torch.testing.assert_close(weight.grad, expected)


def test_a_channel_goes_when_neither_side_has_weights_for_it():
    """What is left, weights and momentum alike, is what was there, and training continues with it."""
    model = network()
    optimizer, method = built(model)
    for batch in batches(3):
        train_step(model, optimizer, batch)
    zero(
        model,
        outputs=[("stages.0.0.conv1", [0, 2]), ("stages.1.0.conv2", [5])],
        inputs=[("stages.0.0.conv2", [2, 3]), ("stages.1.0.conv2", [1])],
    )
    zero_stem(model, [3])
    zero(model, outputs=[("stem.0", [0])])  # the other layers of the sum still have it
    parameters = dict(model.named_parameters())
    before = weights(model)
    momentum = {name: optimizer.state[value]["momentum_buffer"].clone() for name, value in parameters.items()}
    assert method.end_epoch(1.0)
    assert method.state_dict()["kept"] == {
        "stem.0": [0, 1, 2],
        "stages.0.0.conv1": [0, 1, 3],
        "stages.1.0.conv1": list(range(8)),
        "stages.1.0.conv2": list(range(8)),
    }
    conv, norm = model.stages[0][0].conv1, model.stages[0][0].norm1
    assert (conv.in_channels, conv.out_channels, norm.num_features) == (3, 3, 3)
    assert dict(model.named_parameters()).items() == parameters.items()  # the very same objects
    for name, value in model.state_dict().items():
        owner, rows, columns = name.rpartition(".")[0], slice(None), slice(None)
        if owner in ("stem.0", "stem.1", "stages.0.0.conv2", "stages.0.0.norm2"):
            rows = [0, 1, 2]
        if owner in ("stages.0.0.conv1", "stages.0.0.norm1"):
            rows = [0, 1, 3]
        if owner in STEM["inputs"]:
            columns = [0, 1, 2]
        if owner == "stages.0.0.conv2":
            columns = [0, 1, 3]

        def cut(whole, rows=rows, columns=columns):
            kept = whole if whole.dim() == 0 else whole[rows]
            return kept if whole.dim() < 2 else kept[:, columns]

        assert same(value, cut(before[name]))
        if name in parameters:
            assert same(optimizer.state[parameters[name]]["momentum_buffer"], cut(momentum[name]))
    held = weights(model)
    train_step(model, optimizer, batches(1)[0])
    assert all(not same(held[name], parameter.detach()) for name, parameter in parameters.items())


def test_its_facts_are_the_channels_left_and_the_peak_of_the_one_nearest_to_zero():
    model = network()
    _, method = built(model)
    maker, user = model.stages[0][0].conv1.weight, model.stages[0][0].conv2.weight
    with torch.no_grad():
        maker[2].clamp_(-0.01, 0.01)[0, 0, 0] = -0.02
        user[:, 2].clamp_(-0.01, 0.01)[0, 0, 0] = 0.03
    facts = method.facts()
    assert facts["channels"] == 4 + 4 + 8 + 8
    assert facts["smallest_channel"] == pytest.approx(0.03)
    zero(model, outputs=[("stages.0.0.conv1", [2])], inputs=[("stages.0.0.conv2", [2])])
    assert method.facts()["smallest_channel"] == 0
    method.end_epoch(1.0)
    assert method.facts()["channels"] == 23


class Sine(nn.Module):
    """Ties no channels: those that go through it are never pruned."""

    def forward(self, x):
        return torch.sin(x)


def test_training_goes_on_when_no_prunable_channel_is_left():
    torch.manual_seed(0)
    block = BasicBlock(4, 4, 1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Sine(), block, Sine(), head)
    zero(model, outputs=[("2.conv1", range(4))], inputs=[("2.conv2", range(4))])
    optimizer, method = built(model)
    assert method.end_epoch(1.0)
    assert method.facts()["channels"] == 0
    assert method.facts()["smallest_channel"] is None
    assert method.penalty(torch.tensor(1.0)) is None
    train_step(model, optimizer, batches(1)[0])
    assert not method.end_epoch(1.0)


def test_nothing_changes_before_its_time_or_without_need():
    model = network()
    zero_stem(model, [3])
    _, method = built(model, PruneSettings(every=3))
    assert [method.end_epoch(1.0) for _ in range(6)] == [False, False, True, False, False, False]


def test_a_weight_counts_as_zero_below_the_threshold():
    model = network()
    zero_stem(model, [1, 2])
    with torch.no_grad():
        model.stem[0].weight[1, 0, 0, 0] = 0.9e-4
        model.stem[0].weight[2, 0, 0, 0] = -1.1e-4
    _, method = built(model)
    method.end_epoch(1.0)
    assert method.state_dict()["kept"]["stem.0"] == [0, 2, 3]


def test_flops_fall_as_counted():
    model = network()
    _, method = built(model)
    before = dry_cost(method, (5, 2, 6, 6)).flops
    zero_stem(model, [0, 2])
    method.end_epoch(1.0)

    def step(c):
        """Of a training step of five images: two per product, thrice but for the first layer, with a stem of c."""
        forward = {
            "stem": 2 * c * 9 * 36,
            "block": 2 * (4 * c * 9 * 36),
            "rest": 8 * c * 10 * 9 + 8 * 8 * 9 * 9 + 8 * 3,
        }
        return 2 * 5 * (3 * sum(forward.values()) - forward["stem"])

    assert before == step(4)
    assert dry_cost(method, (5, 2, 6, 6)).flops == step(2)
    with FlopCounterMode(display=False) as counter:
        train_step(model, sgd(model), batches(1)[0])
    assert counter.get_total_flops() == step(2)


def test_channels_last_weights_stay_so():
    model = network().to(memory_format=torch.channels_last)
    _, method = built(model)
    zero_stem(model, [1])
    method.end_epoch(1.0)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_a_strided_1x1_convolution_that_becomes_narrow_is_sliced():
    torch.manual_seed(2)
    model = SmallResNet((1, 1), classes=3, in_channels=2, width=16)
    _, method = built(model)
    zero_stem(model, [1, 2])
    images = batches(1)[0][0]
    expected = model.eval()(images)
    assert not any(map(is_unsafe, model.modules()))
    assert method.end_epoch(1.0)
    shortcut = model.stages[1][0].shortcut[0]
    assert (shortcut.in_channels, shortcut.stride) == (14, (1, 1))
    torch.testing.assert_close(model(images), expected)
    state = method.state_dict()
    other = SmallResNet((1, 1), classes=3, in_channels=2, width=16)
    _, method = built(other)
    method.load_state_dict(state)
    assert not any(map(is_unsafe, other.modules()))


def prune_branch(model, block):
    zero(model, outputs=[(f"{block}.conv1", slice(None))], inputs=[(f"{block}.conv2", slice(None))])


@pytest.mark.parametrize("block", ["stages.0.0", "stages.1.0"])
def test_a_branch_without_channels_is_removed(block):
    model = network(torch.float64)
    optimizer, method = built(model)
    for batch in batches(2, torch.float64):
        train_step(model, optimizer, batch)
    prune_branch(model, block)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        norm = zeroed.get_submodule(f"{block}.norm2")  # with the branch goes the constant that this would add
        norm.weight.zero_(), norm.bias.zero_()
    gone = {f"{block}.{name}" for name in ("conv1", "norm1", "conv2", "norm2")}
    keys = [key for key in model.state_dict() if key.rpartition(".")[0] not in gone]
    assert method.end_epoch(1.0)
    assert list(model.state_dict()) == keys
    assert not set(method.layers) & gone
    assert len(method.layers) == 5
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())
    images = batches(1, torch.float64)[0][0]
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(images), zeroed.train(mode)(images), rtol=1e-10, atol=1e-12)
    assert dry_cost(method, (5, 2, 6, 6)).flops > 0
    train_step(model.train(), optimizer, batches(1, torch.float64)[0])


def test_a_removed_branch_no_longer_holds_channels_of_the_sum():
    model = network()
    _, method = built(model)
    zero_stem(model, [1])
    prune_branch(model, "stages.0.0")
    with torch.no_grad():
        model.stages[0][0].conv2.weight[1] = 0.0
    method.end_epoch(1.0)
    assert method.state_dict()["removed"] == ["stages.0.0"]
    assert model.stem[0].out_channels == 3


@pytest.mark.parametrize(
    ("spoil", "layer"),
    [
        (lambda model: zero_stem(model, slice(None)), "stem.0"),
        (
            lambda model: zero(
                model,
                outputs=[("stages.1.0.conv2", slice(None)), ("stages.1.0.shortcut.0", slice(None))],
                inputs=[("head", slice(None))],
            ),
            "stages.1.0.conv2",
        ),
    ],
)
def test_a_network_pruned_to_nothing_is_refused_and_left_alone(spoil, layer):
    model = network()
    optimizer, method = built(model)
    spoil(model)
    prune_branch(model, "stages.0.0")
    before = weights(model), optimizer.state_dict()
    with pytest.raises(LowcalError, match=f"no channel left in layer '{layer}'.*lower prune.ratio"):
        method.end_epoch(1.0)
    assert same((weights(model), optimizer.state_dict()), before)


def saved(*things):
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in things], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_state_is_taken_up_across_removals_bitwise():
    settings = PruneSettings(every=1)
    model = network()
    optimizer, method = built(model, settings)

    def epoch(number, model, optimizer, method):
        for images, labels in batches(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            (loss + method.penalty(loss)).backward()
            optimizer.step()
        if number == 1:
            zero_stem(model, [1])
        if number == 2:
            prune_branch(model, "stages.1.0")
        if number == 3:
            zero(model, outputs=[("stem.0", [0])])
        return method.end_epoch(1.0)

    for number in range(4):
        changed = epoch(number, model, optimizer, method)
        assert changed == (number in (1, 2))
        state_of_method, state_of_model, state_of_optimizer = saved(method, model, optimizer)
        other = network()
        other_optimizer, other_method = built(other, settings)
        other_method.load_state_dict(state_of_method)
        other.load_state_dict(state_of_model)
        other_optimizer.load_state_dict(state_of_optimizer)
        whole = copy.deepcopy((weights(model), optimizer.state_dict(), method.state_dict()))
        assert same((weights(other), other_optimizer.state_dict(), other_method.state_dict()), whole)
        model, optimizer, method = other, other_optimizer, other_method


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["kept"].pop("stem.0"),
        lambda state: state["kept"].update({"stem.0": []}),
        lambda state: state["kept"].update({"stem.0": [1, 0]}),
        lambda state: state["kept"].update({"stem.0": [3, 4]}),
        lambda state: state.update(removed=["stages.7"]),
        lambda state: state.update(finished="often"),
        lambda state: state.update(coefficient=0.1),
        lambda state: state.clear(),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(spoil):
    model = network()
    _, method = built(model)
    before = weights(model), method.state_dict()
    damaged = method.state_dict()
    spoil(damaged)
    with pytest.raises(LowcalError, match="prune: the state"):
        method.load_state_dict(damaged)
    assert same((weights(model), method.state_dict()), before)


@pytest.mark.parametrize("name", ["local+prune", "local+stochastic-depth"])
def test_combinations_are_refused(name):
    model = network()
    with pytest.raises(LowcalError, match="cannot be combined yet"):
        build_method(name, model, sgd(model), EVERY_EPOCH, epochs=4, example_inputs=batches(1)[0][0])
