"""`hebbian_update` against explicit patches and sums, and the published decay of its step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowcal import Frozen, Hebbian, LowcalError, hebbian_update
from lowcal.rules import apply_updates

from .reference import weight_product

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# torch says that an even kernel with padding='same' costs it a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@st.composite
def convolutions(draw):
    """A float64 convolution and an input that it accepts."""
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2))
    outputs = groups * draw(st.integers(1, 2))  # groups == channels: depthwise, with or without a multiplier
    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    extent = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    size = tuple(e + more for e, more in zip(extent, each(1, 3), strict=True))
    padding = draw(st.sampled_from(["same", "valid", "tuple", "int"]))
    if padding == "same":
        stride = (1,) * dims
    elif padding == "tuple":
        padding = tuple(min(p, s - 1) for p, s in zip(each(0, 2), size, strict=True))
    elif padding == "int":
        padding = draw(st.integers(0, min(2, *(s - 1 for s in size))))
    module = CONVS[dims](
        channels,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module, torch.randn(*batch, channels, *size, generator=generator, dtype=torch.float64)


def assert_matches(module, inputs, outputs, update, tolerance):
    expected = weight_product(module, inputs, outputs)
    assert update.shape == module.weight.shape
    error = (update.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


@given(convolutions())
@settings(max_examples=80)
def test_convolution_is_the_sum_over_patches(case):
    module, inputs = case
    outputs = module(inputs)
    assert_matches(module, inputs, outputs, hebbian_update(module, inputs, outputs), 1e-12)


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 5, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_sum_of_outer_products(shape, bias):
    module = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    inputs = torch.randn(shape, dtype=torch.float64)
    outputs = module(inputs)
    assert_matches(module, inputs, outputs, hebbian_update(module, inputs, outputs), 1e-12)


def test_linear_by_hand():
    module = nn.Linear(2, 1)
    inputs, outputs = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[10.0], [100.0]])
    assert hebbian_update(module, inputs, outputs).tolist() == [[310.0, -80.0]]


def test_convolution_by_hand():
    module = nn.Conv1d(1, 1, 2, stride=2, padding=1)
    inputs, outputs = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[10.0, 100.0]]])
    # patches (0, 1) and (2, 3)
    assert hebbian_update(module, inputs, outputs).tolist() == [[[200.0, 310.0]]]


def test_an_even_kernel_with_same_padding_pads_behind():
    module = nn.Conv1d(1, 1, 2, padding="same")
    inputs, outputs = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[10.0, 100.0]]])
    # patches (1, 2) and (2, 0)
    assert hebbian_update(module, inputs, outputs).tolist() == [[[210.0, 20.0]]]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last(dims, groups):
    memory = torch.channels_last if dims == 2 else torch.channels_last_3d
    module = CONVS[dims](4, 8, 3, padding=1, stride=2, groups=groups).to(memory_format=memory)
    inputs = torch.randn(2, 4, *[5] * dims).to(memory_format=memory)
    outputs = module(inputs)
    assert_matches(module, inputs, outputs, hebbian_update(module, inputs, outputs), 1e-5)


def test_inputs_need_not_be_contiguous():
    module = nn.Conv2d(3, 4, 3)
    inputs = torch.randn(2, 6, 3, 7).permute(0, 2, 3, 1)
    outputs = module(inputs)
    assert_matches(module, inputs, outputs, hebbian_update(module, inputs, outputs), 1e-5)
    linear = nn.Linear(6, 4)
    inputs = torch.randn(6, 5, 2).permute(2, 1, 0)
    outputs = linear(inputs)
    assert_matches(linear, inputs, outputs, hebbian_update(linear, inputs, outputs), 1e-5)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 5), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 6, 3, groups=6)],
    ids=lambda module: type(module).__name__ + ("" if getattr(module, "groups", 1) == 1 else " depthwise"),
)
def test_autocast(module, dtype, inside):
    inputs = torch.randn({nn.Linear: (9, 6), nn.Conv1d: (2, 6, 8)}.get(type(module), (2, 6, 5, 5)))
    with torch.autocast("cpu", dtype=dtype):
        outputs = module(inputs)
        assert outputs.dtype == dtype
        if inside:
            update = hebbian_update(module, inputs, outputs)
    if not inside:
        update = hebbian_update(module, inputs, outputs)
    assert_matches(module, inputs, outputs, update, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
@pytest.mark.parametrize("half_inputs", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_sum_beyond_the_range_of_float16_stays_finite_and_right(kind, half_inputs, inside):
    module = nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(4, 3, 3, padding=1)
    inputs = 50 + torch.rand(64, 4) if kind == "linear" else 50 + torch.rand(4, 4, 8, 8)
    if half_inputs:  # as behind another layer under autocast
        inputs = inputs.half()
    outputs = (60 + torch.rand(64, 3)).half() if kind == "linear" else (60 + torch.rand(4, 3, 8, 8)).half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=inside):
        update = hebbian_update(module, inputs, outputs)
    assert weight_product(module, inputs, outputs).min() > torch.finfo(torch.float16).max
    assert update.isfinite().all()
    assert_matches(module, inputs, outputs, update, 4e-3)


@pytest.mark.parametrize("scale", [1e-3, 600.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float16_is_right_for_long_sums_of_small_and_of_large_activations(kind, scale):
    """Both factors are in the normal range of float16; their products and sums are not."""
    module = nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(4, 3, 3, padding=1)
    inputs = scale * torch.randn((2**18, 4) if kind == "linear" else (16, 4, 64, 64))
    outputs = scale * torch.randn((2**18, 3) if kind == "linear" else (16, 3, 64, 64))
    outputs = (outputs + inputs[:, :3] / 2).half()
    if kind == "linear":
        expected = outputs.double().T @ inputs.double()
    else:
        expected = nn.grad.conv2d_weight(inputs.double(), module.weight.shape, outputs.double(), padding=1)
    with torch.autocast("cpu", dtype=torch.float16):
        update = hebbian_update(module, inputs, outputs)
    assert update.isfinite().all()
    assert (update - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("outlier", [3e4])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float16_is_right_beside_an_outlier(kind, outlier):
    module = nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(4, 3, 3, padding=1)
    inputs = torch.randn((2**18, 4) if kind == "linear" else (16, 4, 128, 128))
    outputs = torch.randn((2**18, 3) if kind == "linear" else (16, 3, 128, 128)) + inputs[:, :3] / 2
    inputs.view(-1)[5] = outputs.view(-1)[7] = outlier
    outputs = outputs.half()
    if kind == "linear":
        expected = outputs.double().T @ inputs.double()
    else:
        expected = nn.grad.conv2d_weight(inputs.double(), module.weight.shape, outputs.double(), padding=1)
    with torch.autocast("cpu", dtype=torch.float16):
        update = hebbian_update(module, inputs, outputs)
    assert (update - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("module", [nn.Linear(6, 5), nn.Conv2d(6, 4, 3)], ids=["linear", "conv"])
def test_the_rule_leaves_the_cast_to_apply_updates(module):
    inputs = torch.randn((9, 6) if isinstance(module, nn.Linear) else (2, 6, 5, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(inputs)
        half, public = Hebbian().update(module, inputs, outputs), hebbian_update(module, inputs, outputs)
    assert (half.dtype, public.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(half.float(), public)
    for relative in (False, True):
        by_half, by_single = ([module.weight.detach().clone()] for _ in range(2))
        apply_updates(by_half, [half.clone()], 0.1, relative=relative)
        apply_updates(by_single, [public.clone()], 0.1, relative=relative)
        assert torch.equal(by_half[0], by_single[0])
        assert not torch.equal(by_half[0], module.weight)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e30, torch.inf, torch.nan])
def test_an_update_that_cannot_be_normalised_leaves_its_weight_alone(value):
    weights, updates = [torch.ones(3), torch.ones(3)], [torch.full((3,), value), torch.tensor([0.0, 2.0, 0.0])]
    skipped = apply_updates(weights, updates, 0.5)
    assert torch.equal(weights[0], torch.ones(3))
    assert weights[1].tolist() == [1.0, 1.5, 1.0]
    assert int(skipped) == 1


def test_a_weight_whose_norm_overflows_stays_as_it_is_under_relative_steps():
    weights, updates = [torch.full((3,), 1e30), torch.ones(4)], [torch.ones(3), torch.tensor([0.0, 2.0, 0.0, 0.0])]
    assert int(apply_updates(weights, updates, 0.5, relative=True)) == 0
    assert torch.equal(weights[0], torch.full((3,), 1e30))
    assert weights[1].tolist() == [1.0, 2.0, 1.0, 1.0]


def test_the_update_carries_no_graph_and_changes_nothing():
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    inputs = torch.randn(2, 2, 4, 4, requires_grad=True)
    outputs = module(inputs)
    before = [t.detach().clone() for t in (inputs, outputs, module.weight, module.bias)]
    first, second = (hebbian_update(module, inputs, outputs) for _ in range(2))
    assert not first.requires_grad
    assert first.grad_fn is None
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (inputs, outputs, module.weight, module.bias), strict=True))
    assert inputs.grad is None
    assert module.weight.grad is None
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()])
def test_a_module_that_is_no_layer_is_refused(module):
    inputs = torch.randn(1, 2, 3, 3)
    with pytest.raises(LowcalError, match=type(module).__name__):
        hebbian_update(module, inputs, module(inputs))


@pytest.mark.parametrize(
    ("decay", "expected"),
    [(0.5, {0: 0.01, 29: 0.01, 30: 0.005, 59: 0.005, 60: 0.0025, 89: 0.0025, 149: 0.000625}),
     (0.1, {0: 0.01, 29: 0.01, 30: 0.001, 59: 0.001, 60: 0.0001, 89: 0.0001})],
    ids=["cifar", "imagenet"],
)  # fmt: skip
def test_published_decay_counts_from_epoch_0(decay, expected):
    rule = Hebbian(decay=decay)
    assert {epoch: rule.step_size(epoch) for epoch in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -0.1), ("lr", math.nan), ("lr", math.inf), ("lr", "0.1"),
     ("decay", -0.5), ("decay", math.nan), ("decay_every", 0), ("decay_every", -3), ("decay_every", 1.5),
     ("scale", "x"), ("every", 0), ("every", -1), ("every", 1.5)],
)  # fmt: skip
def test_hebbian_refuses(name, value):
    with pytest.raises(LowcalError, match=rf"{name}\b.*{value}") as error:
        Hebbian(**{name: value})
    assert "\n" not in str(error.value)


def test_frozen_takes_no_settings():
    assert Frozen() == Frozen()
    with pytest.raises(TypeError):
        Frozen(lr=0.1)
