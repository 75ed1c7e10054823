"""Products of local updates on a second stream: with one in software that does its work as late as it may."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowcal
from lowcal import LowcalError, overlap
from lowcal.experiments.backends import kernels
from lowcal.experiments.bench.run import bench
from lowcal.experiments.bench.setup import BenchSettings
from lowcal.steps import graphed
from lowcal.steps.graphed import OverlappedGraphedStep
from lowcal.steps.overlapped import OverlappedStep
from lowcal.steps.step import EagerStep, StepOptions

from ..networks import convnet, images
from ..support import same
from ..training.runs import make_run, outcome, run_on, settings
from .software_graphs import LateStream, SoftwareGraphs
from .test_compiled import attached
from .test_graphed import on_cuda
from .test_make_step import RULES, made, plain, trained

MODE = "graphed-overlapped"


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    monkeypatch.setattr(overlap, "STREAM", LateStream)
    monkeypatch.setattr(LateStream, "work", 0)
    monkeypatch.setattr(LateStream, "joins", 0)
    return LateStream


@pytest.mark.parametrize("method", ["local", "refresh", "sgd"])
def test_a_run_is_bitwise_the_eager_one(tmp_path, late, method):
    """Also across moves, a smaller last mini-batch and steps without updates."""
    local = settings(every=2, refresh_every=3, decay_every=2)
    runs = [
        run_on(make_run(tmp_path / step, method, epochs=6, local=local, step=step, fused=True))
        for step in ("eager", MODE)
    ]
    assert same(*map(outcome, runs))
    assert (late.work > 0) == (method == "local")


@pytest.mark.parametrize("rule", RULES)
def test_it_is_bitwise_the_loop(late, rule):
    assert same(trained(plain(), rule=rule, scheduler=True), trained(made(MODE), rule=rule, scheduler=True))
    assert (late.work > 0) == (rule in ("hebbian", "every"))


def without_norms():
    """Each activation overwrites the output of its convolution."""
    return convnet(norm=False, inplace=True)


class Activated(nn.Conv2d):
    """Overwrites the output of its product itself."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=self.padding).relu_()


class Shifted(nn.Module):
    """Overwrites the input of its convolution after that has run, where no gradient needs it."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(48, 3)

    def forward(self, x):
        x = self.stem(x).tanh()
        y = self.conv(x).tanh()
        x = x + 1.0 if y.requires_grad else x.add_(1.0)
        return self.head(x.mul(y).flatten(1))


def activated():
    return nn.Sequential(Activated(2, 3, 3), nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


@pytest.mark.parametrize(
    ("network", "in_line"),
    [(without_norms, {"conv1", "conv2"}), (activated, {"0"}), (Shifted, {"conv"}), (convnet, set())],
)
def test_products_whose_operands_are_overwritten_stay_in_line(late, network, in_line):
    assert same(trained(plain(), rule="hebbian", network=network), trained(made(MODE), rule="hebbian", network=network))
    step = stepped(network)
    assert step.overlap.in_line == in_line


def stepped(network=convnet, steps=3):
    """An overlapped step, recorded by nothing, of a network with two local layers, after some calls."""
    torch.manual_seed(0)
    model = network()
    optimizer, method = attached(model, moves={5: 1}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    method.move_to(2)
    step = OverlappedStep(model, (optimizer,), method, StepOptions(torch.device("cpu")))
    for batch in images(steps):
        step(*batch)
    return step


def test_the_first_step_of_a_kind_runs_in_line(late):
    step = stepped(steps=1)
    assert (late.work, late.joins) == (0, 0)
    step(*images(1)[0])
    assert (late.work, late.joins) == (2, 1)
    step(*(tensor[:2] for tensor in images(1)[0]))
    assert (late.work, late.joins) == (2, 1)


def test_products_start_when_all_local_layers_have_run(late, monkeypatch):
    """The layers after the boundary leave more of the device idle."""
    events = []
    step = stepped(steps=1)
    for name, module in step._model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: events.append(name))
    run = late.run
    monkeypatch.setattr(late, "run", lambda self, *args: events.append("product") or run(self, *args))
    step(*images(1)[0])
    assert events[:4] == ["conv1", "product", "product", "conv2"]  # local hooks come before this test's
    assert len(events) > 4


def test_what_is_kept_is_counted_and_limited(late, monkeypatch):
    """The streams join when the next layer's operands are too much, and a layer that is too large stays in line."""
    expected = trained(plain(), rule="hebbian")
    whole = stepped().overlap.most_held
    batch = len(images(1)[0][0])
    # conv1 reads 2 channels of 6x6 and makes 4; conv2 reads 4 others and makes 4
    assert whole == 4 * batch * 36 * (2 + 4 + 4 + 4)
    for limit, work, joins in ((whole, 4, 2), (whole - 1, 4, 4), (4 * batch * 36 * 7, 2, 2), (1, 0, 0)):
        monkeypatch.setattr(overlap, "HELD_BYTES", limit)
        late.work = late.joins = 0
        assert stepped().overlap.most_held <= limit
        assert (late.work, late.joins) == (work, joins), limit
        assert same(expected, trained(made(MODE), rule="hebbian"))


def test_an_operand_overwritten_after_an_early_join_is_no_harm(late, monkeypatch):
    monkeypatch.setattr(overlap, "HELD_BYTES", stepped(Shifted).overlap.most_held - 1)
    for network in (Shifted, without_norms):
        expected = trained(plain(), rule="hebbian", network=network)
        assert same(expected, trained(made(MODE), rule="hebbian", network=network))


@pytest.mark.parametrize("network", [convnet, without_norms])
def test_in_parts_it_is_as_eager(late, network):
    one, other = (trained(made(mode, accumulate=4), rule="hebbian", network=network) for mode in ("eager", MODE))
    assert same(one, other)
    assert (late.work > 0) == (network is convnet)


def test_a_loss_that_runs_the_network_again(late):
    more, labels = images(1, seed=9)[0]

    def step_of(mode):
        def build(model, optimizers, local):
            def loss_fn(scores, targets):
                return F.cross_entropy(scores, targets) + F.cross_entropy(model(more), labels)

            return lowcal.make_step(model, optimizers, loss_fn, local, mode)

        return build

    assert same(*(trained(step_of(mode), rule="hebbian") for mode in ("eager", MODE)))
    assert late.work > 0


class Switched(nn.Module):
    """Overwrites the output of its first layer from now on once `on` is set."""

    def __init__(self):
        super().__init__()
        self.one, self.head, self.on = nn.Linear(72, 4), nn.Linear(4, 3), False

    def forward(self, x):
        x = self.one(x.flatten(1))
        return self.head(x.tanh_() if self.on else x.tanh())


def test_a_network_that_overwrites_later_only_is_refused(late):
    model = Switched()
    optimizer, method = attached(model, moves={5: 1}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    method.move_to(1)
    step = OverlappedStep(model, (optimizer,), method, StepOptions(torch.device("cpu")))
    step(*images(1)[0])
    model.on = True
    with pytest.raises(LowcalError, match="overwrote the input or output of 'one' in place, but not in") as error:
        step(*images(1)[0])
    assert "\n" not in str(error.value)
    model.on = False
    step(*images(1)[0])  # nothing is left of the step that failed


def test_outside_of_the_step_products_run_in_line(late):
    step = stepped(steps=1)
    model = step._model
    for inputs, labels in images(2):
        F.cross_entropy(model(inputs), labels).backward()
    assert late.work == 0


def test_bench_measures_it(late):
    settings = BenchSettings(
        "resnet8", batch=2, image_size=8, width=2, boundaries=(0.5,), step=MODE, every=1, rounds=1, warm_up=1,
        layers=False, compile=False,
    )  # fmt: skip
    result = bench(settings, torch.device("cpu"), lambda text: None)
    assert result["settings"]["step"] == MODE
    assert late.work > 0


def test_it_needs_cuda(monkeypatch):
    monkeypatch.undo()
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with pytest.raises(LowcalError, match="needs a CUDA device, and this network is on cpu"):
        lowcal.make_step(model, optimizer, F.cross_entropy, mode=MODE)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("method", ["local", "freeze"])
def test_a_branch_of_a_cuda_graph_gives_eager_s_losses(monkeypatch, method, precision):
    monkeypatch.undo()
    with kernels(deterministic=True):
        eager, graph = (on_cuda(kind, method, precision=precision) for kind in (EagerStep, OverlappedGraphedStep))
    torch.testing.assert_close(graph[0], eager[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(graph[1], eager[1], rtol=1e-2, atol=1e-2)
