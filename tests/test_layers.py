"""The layers of a network in execution order, what follows each, and the block that recurs."""

from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn

import lowcal
from lowcal.layers import block_ends, recurring_block

from .networks import Optional, Residual, convnet, images, mlp, vectors
from .support import changed, same, sgd, snapshot, train_step, weights


def controller(model, inputs, **options):
    options.setdefault("schedule", lowcal.Fixed({8: 1}))
    return lowcal.LoCal(model, sgd(model), epochs=9, example_inputs=inputs, **options)


def test_layers_are_in_execution_order_not_in_order_of_registration():
    order = ("stem", "first", "second", "shortcut", "middle", "head")
    assert controller(Residual(), images(1)[0][0]).layers == order


@pytest.mark.parametrize("boundary", range(1, 6))
def test_parameters_follow_the_layer_run_last_before_them(boundary):
    model = Residual()
    local = controller(model, images(1)[0][0])
    local.move_to(boundary)
    follows = {"input_norm": 1, "first_norm": 2, "second_norm": 3, "gain": 3}  # gain is used before the shortcut
    since = {**follows, **{name: index for index, name in enumerate(local.layers, 1)}}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (boundary < since[name.partition(".")[0]]), name


def test_reading_the_shape_of_a_parameter_is_no_use_of_it():
    class Reads(Residual):
        def forward(self, x):
            return super().forward(x.to(self.gain.dtype).expand(-1, *x.shape[1:-1], self.gain.shape[1] + 2))

    model = Reads()
    local = controller(model, images(1)[0][0])
    local.move_to(2)
    assert model.gain.requires_grad
    local.move_to(3)
    assert not model.gain.requires_grad


def test_layers_are_known_after_the_first_forward():
    model = Residual()
    local = controller(model, None)
    assert local.layers == ()
    model(images(1)[0][0])
    assert local.layers == ("stem", "first", "second", "shortcut", "middle", "head")
    local.move_to(2)
    assert local.boundary == 2


def test_a_first_forward_that_fails_does_not_count():
    model = convnet()
    local = controller(model, None)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(torch.zeros(1, 2, 1, 1))
    assert local.layers == ()
    model(images(1)[0][0])
    assert local.layers == ("conv1", "conv2", "conv3", "head")


def test_a_layer_left_out_of_the_first_forward_takes_its_place_later():
    model = Optional()
    local = controller(model, None)
    model.skip = True
    model(vectors(1)[0][0])
    assert local.layers == ("one", "three", "head")
    model.skip = False
    for _ in range(2):
        model(vectors(1)[0][0])
    assert local.layers == ("one", "two", "three", "head")


def test_a_layer_met_in_the_middle_of_an_epoch_does_not_restart_the_epoch():
    model = Optional()
    local = controller(model, None)
    model.skip = True
    start = model.one.weight.detach().clone()  # the transition layer throughout
    for index, batch in enumerate(vectors(4)):
        model.skip = index < 2
        train_step(model, local.optimizer, batch)
    assert len(local.layers) == 4
    local.end_epoch(1.0)
    assert local.change == pytest.approx(float((model.one.weight.detach() - start).norm()), rel=1e-5)


@contextmanager
def refusal_or_success(naming):
    try:
        yield
    except lowcal.LowcalError as error:
        message = str(error)
    else:
        return
    assert naming in message


def test_a_layer_met_in_the_pass_before_a_move_does_not_mix_up_the_layers():
    model = Optional()
    local = controller(model, None)
    model.skip = True
    train_step(model, local.optimizer, vectors(1)[0])
    model.skip = False
    train_step(model, local.optimizer, vectors(1)[0])
    with refusal_or_success(naming="two"):
        local.move_to(2)
        expected = set(local.layers[:2])
        for batch in vectors(2):
            before = weights(model)
            train_step(model, local.optimizer, batch)
            assert set(local.layers[:2]) == expected
            prefix = {name for name in changed(before, model) if name.partition(".")[0] in expected}
            assert prefix == {f"{name}.weight" for name in expected}


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_example_inputs_may_be_a_tensor_arguments_or_keywords(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x, gain=1.0):
            return self.b(self.a(x) * gain)

    x = torch.randn(2, 4)
    example = {"tensor": x, "tuple": (x, 2.0), "dict": {"gain": 2.0, "x": x}}[kind]
    assert controller(Two(), example).layers == ("a", "b")


class Counter(nn.Module):
    """Counts its forward passes in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x


@pytest.mark.parametrize("training", [True, False])
def test_example_inputs_leave_everything_as_it_was(training):
    model = convnet()
    model.act1 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), Counter())
    model.train(training)
    model.norm2.train(not training)
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    inputs = images(1)[0][0]
    original = inputs.clone()
    local = lowcal.LoCal(model, optimizer, epochs=9, example_inputs=inputs)
    after = snapshot(model, optimizer)
    local.detach()
    assert torch.equal(inputs, original)
    for key in before.keys() - {"hooks"}:
        assert same(before[key], after[key]), key


def test_one_example_is_enough_for_batch_normalisation():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert controller(model, torch.zeros(1, 4)).layers == ("0", "2")


@pytest.mark.parametrize("name", ["one.weight", "two.bias"])
def test_a_parameter_that_the_user_froze_stays_frozen(name):
    model = mlp()
    model.get_parameter(name).requires_grad_(False)
    local = controller(model, vectors(1)[0][0])
    local.move_to(2)
    before = weights(model)
    train_step(model, local.optimizer, vectors(1)[0])
    assert name not in changed(before, model)
    local.detach()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [name]


# L, t_shift and the ends of blocks in the paper's networks: L counts shortcut convolutions and the classifier.
@pytest.mark.parametrize(
    ("name", "layers", "shift", "ends"),
    [
        ("resnet18", 1 + 16 + 3 + 1, 2, [1, 3, 5, 8, 10, 13, 15, 18, 20, 21]),
        # A stage's first bottleneck has a fourth layer, in its shortcut; stem and classifier are in no block.
        ("resnet50", 1 + 48 + 4 + 1, 3, [1, 5, 8, 11, 15, 18, 21, 24, 28, 31, 34, 37, 40, 43, 47, 50, 53, 54]),
        ("mobilenet_v2", 1 + 2 + 16 * 3 + 1 + 1, 3, [1, 3, *range(6, 52, 3), 52, 53]),
        ("vgg13", 10 + 3, 1, list(range(1, 14))),  # no block
        # Sec. 3.3: accuracy suffers below 5% of the depth, so a block of 3 counts twice there.
        ("resnet101", 1 + 99 + 4 + 1, 6, None),
    ],
)
def test_the_networks_of_the_paper(name, layers, shift, ends):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
        local = controller(model, torch.empty(2, 3, 64, 64))
    assert len(local.layers) == layers
    assert recurring_block(model, local.layers) == shift
    assert 0.05 <= shift / layers <= 0.10  # Sec. 3.3
    assert ends is None or list(block_ends(model, local.layers)) == ends


class Chain(nn.Module):
    """A block of `size` linear layers in a row."""

    def __init__(self, size):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(size))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Other(Chain):
    """Another class of block."""


def blocks_of(*kinds):
    """A network of blocks, each a pair of class and layers."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(kind(size) for kind, size in kinds)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    return Net()


def order_of(model):
    return controller(model, vectors(1)[0][0]).layers


@pytest.mark.parametrize(("blocks", "shift"), [(20, 3), (21, 6), (40, 6), (41, 9)])
def test_5_percent_is_enough(blocks, shift):
    model = blocks_of(*[(Chain, 3)] * blocks)
    assert recurring_block(model, order_of(model)) == shift


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("kinds", "shift"),
    [
        ([(Chain, 4)] * 3 + [(Other, 2)] * 5, 4),  # 12 layers against 10 in more blocks
        ([(Chain, 2)] * 6 + [(Other, 5)] * 2, 2),  # 12 layers against 10 in deeper blocks
        ([(Chain, 4)] * 2 + [(Other, 9)], 4),  # a block that occurs once recurs not
        ([(Chain, 2)] * 3 + [(Other, 3)] * 2 + [(Other, 4)] * 2, 2),  # nor one whose instances differ
    ],
)
def test_the_recurring_block_covers_most_of_the_network(kinds, shift, reverse):
    model = blocks_of(*(reversed(kinds) if reverse else kinds))
    assert recurring_block(model, order_of(model)) == shift


def test_blocks_end_where_their_layers_do_in_execution_order():
    """Layers of two blocks that run in turn: no position between the first and the last of both cuts none."""
    model = blocks_of((Chain, 2), (Chain, 2), (Chain, 2))
    layers = order_of(model)
    assert block_ends(model, layers) == (2, 4, 6)
    assert block_ends(model, (layers[0], layers[2], layers[1], layers[3], *layers[4:])) == (4, 6)


def test_a_schedule_is_told_the_recurring_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.b(self.a(x).relu())

    class Spy(lowcal.NormTrend):
        def __call__(self, progress):
            blocks.append((progress.block, progress.ends))
            return progress.boundary

    blocks = []
    model = nn.Sequential(nn.Linear(4, 4), *(Block() for _ in range(10)), nn.Linear(4, 3))  # 2 of 22 layers: 9%
    local = controller(model, vectors(1)[0][0], schedule=Spy())
    train_step(model, local.optimizer, vectors(1)[0])
    local.end_epoch(1.0)
    assert blocks == [(2, (1, *range(3, 23, 2), 22))]
