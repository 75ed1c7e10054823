"""What `save_drop_path` refuses, and where it leaves the network's own drop path."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.ops import StochasticDepth

from lowcal import LowcalError, drop_path, make_step, save_drop_path
from lowcal.steps import graphed

from .drop_path_networks import LAYER_NORM, Sizes, convnext, efficientnet, images, with_rate
from .steps.software_graphs import SoftwareGraphs
from .support import hooks, same, sgd


def test_batch_normalisation_is_refused_unless_it_is_accepted():
    model = efficientnet()
    before = hooks(model, sgd(model))
    with pytest.raises(LowcalError, match=r"'features.1.0' has batch normalisation, .*allow_batch_norm=True"):
        save_drop_path(model)
    assert hooks(model, sgd(model)) == before
    save_drop_path(model, allow_batch_norm=True)
    with_rate(model, 1.0)
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
        (nn.Sequential(Unknown()), r"does not know the block '0', a tests.test_drop_path_limits.Unknown"),
        (
            nn.Sequential(TwiceBlock(4, 0.5, 0.5)),
            r"does not know the block '0', a tests.test_drop_path_limits.TwiceBlock",
        ),
        ("convnext", "the model is str"),
        (nn.DataParallel(convnext()), "DataParallel"),
        (torch.compile(convnext(), backend="eager"), "compiled"),
    ],
)
def test_networks_that_it_cannot_handle_are_refused_by_name(model, message):
    with pytest.raises(LowcalError, match=message):
        save_drop_path(model)


def test_a_network_compiled_in_place_is_refused():
    model = convnext()
    model.compile(backend="eager")
    with pytest.raises(LowcalError, match="compiled"):
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
    with pytest.raises(LowcalError, match=r"the block 'blocks.1' got a second tensor"):
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
