"""`lowcal.make_step`: a loop's body as one call, the same as the loop in every mode."""

import copy
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowcal
from lowcal import LowcalError
from lowcal.steps import compiled, graphed, make

from ..networks import convnet, images
from ..support import same, weights
from ..training.runs import network as blocks
from .software_graphs import SoftwareGraphs

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "two": lambda p: (
        torch.optim.AdamW((p := list(p))[:3], lr=0.01, fused=True),
        torch.optim.SGD(p[3:], lr=0.1, momentum=0.9, fused=True),
    ),
}
RULES = {
    None: None,
    "hebbian": lowcal.Hebbian(lr=0.05, decay_every=1),
    "every": lowcal.Hebbian(every=2),
    "frozen": lowcal.Frozen(),
    "refresh": lowcal.Refresh(every=3),
}


@pytest.fixture
def software(monkeypatch):
    """CUDA graphs in software, which "auto" takes on the CPU too."""
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(make, "candidates", lambda device: ("eager", "graphed"))
    return SoftwareGraphs


def trained(step_of, *, optimizer="SGD", rule=None, scheduler=False, epochs=4, steps=9, network=convnet):
    """Weights and losses after epochs with two moves; `step_of` makes the step from model, optimizers and local."""
    torch.manual_seed(0)
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    optimizers = list(made) if isinstance(made, tuple) else [made]
    local, inputs = None, images(1)[0][0]
    if rule is not None:
        schedule = lowcal.Fixed({1: 1, 2: 2})
        local = lowcal.LoCal(
            model, optimizers, epochs=epochs, rule=RULES[rule], schedule=schedule, example_inputs=inputs
        )
    step = step_of(model, optimizers, local)
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers] if scheduler else []
    losses = []
    for epoch in range(epochs):
        batches = images(steps, seed=epoch)
        batches.append(tuple(tensor[:3] for tensor in batches[0]))  # a smaller last one
        losses.append([step(*batch) for batch in batches])
        for each in rates:
            each.step()
        if local is not None:
            local.end_epoch(torch.stack(losses[-1]).mean())
    return {"weights": weights(model), "losses": losses, "states": [o.state_dict()["state"] for o in optimizers]}


def smooth():
    """No statistics of the mini-batch, and no gradient that is zero but for rounding, which Adam would blow up."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4), nn.Tanh(), nn.Linear(4, 3))


def plain(*, max_norm=None, dtype=None, scaler=None):
    """The body of a loop as a person writes it."""

    def step_of(model, optimizers, local):
        def step(inputs, targets):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(inputs), targets)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizers[0])
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for optimizer in optimizers:
                optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
            return loss.detach()

        return step

    return step_of


def made(mode="graphed", dtype=None, **options):
    def step_of(model, optimizers, local):
        step = lowcal.make_step(model, optimizers, F.cross_entropy, local, mode, **options)

        def call(*batch):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return step(*batch)

        return call

    return step_of


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["eager", "graphed", "auto"])
def test_it_is_bitwise_the_loop(software, mode, rule):
    software.recorded = 0
    assert same(trained(plain(), rule=rule, scheduler=True), trained(made(mode), rule=rule, scheduler=True))
    assert (software.recorded > 0) == (mode != "eager")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_any_optimizer_that_stays_on_the_device(software, optimizer):
    one, other = (
        trained(step_of, optimizer=optimizer, rule="hebbian", scheduler=True, network=smooth)
        for step_of in (plain(max_norm=0.5), made(max_norm=0.5))
    )
    for name in ("weights", "losses"):  # fused Adam reads a rate on the device in single precision
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert software.recorded > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_within_autocast(software, dtype):
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) if dtype == torch.float16 else None for _ in range(2)]
    one = trained(plain(dtype=dtype, scaler=scalers[0]), rule="hebbian")
    other = trained(made(dtype=dtype, scaler=scalers[1]), rule="hebbian")
    assert same(one["losses"], other["losses"])
    assert same(one["weights"], other["weights"])
    if dtype == torch.float16:
        assert scalers[0].state_dict() == scalers[1].state_dict()


def test_one_autocast_context_may_hold_many_steps(software):
    """Autocast keeps cast weights until its outermost context ends."""
    ends = []
    for mode, is_outer in (("eager", False), ("eager", True), ("graphed", True)):
        model, _, step = fresh(mode)
        with torch.autocast("cpu", torch.bfloat16) if is_outer else nullcontext():
            for batch in images(6):
                with torch.autocast("cpu", torch.bfloat16):
                    step(*batch)
            with torch.no_grad():
                ends.append((weights(model), model(images(1)[0][0]).float() if is_outer else None))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[1], ends[2])


def test_in_parts_it_is_the_whole_mini_batch(software):
    runs = [
        trained(made(mode, accumulate=count), rule="hebbian", network=smooth)
        for mode, count in (("eager", 1), ("eager", 4), ("graphed", 4))
    ]
    torch.testing.assert_close(runs[0]["weights"], runs[1]["weights"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0]["losses"], runs[1]["losses"], rtol=1e-4, atol=1e-5)
    assert same(runs[1], runs[2])


@pytest.mark.parametrize("mode", ["compiled", "graphed-compiled"])
def test_compiled_blocks_change_nothing(software, mode):
    one, other = (trained(made(each), rule="hebbian", epochs=3, network=blocks) for each in ("eager", mode))
    torch.testing.assert_close(one["weights"], other["weights"])


def fresh(mode="graphed", **options):
    torch.manual_seed(0)
    model = convnet()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    return model, optimizer, lowcal.make_step(model, optimizer, F.cross_entropy, mode=mode, **options)


def change_momentum(model, optimizer):
    optimizer.param_groups[0]["momentum"] = 0.5


def load_optimizer(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_model(model, optimizer):
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})


def freeze(model, optimizer):
    next(model.parameters()).requires_grad_(False)


def evaluate(model, optimizer):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def move_storage(model, optimizer):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize(
    "change", [change_momentum, load_optimizer, load_model, freeze, evaluate, move_storage], ids=lambda f: f.__name__
)
def test_what_is_recorded_is_never_stale(software, change):
    ends = []
    for mode in ("eager", "graphed"):
        model, optimizer, step = fresh(mode)
        for batch in images(5):
            step(*batch)
        change(model, optimizer)
        losses = [step(*batch) for batch in images(5, seed=1)]
        ends.append((weights(model), losses))
    assert same(*ends)


def test_a_returned_loss_stays_what_it_is(software):
    _, _, step = fresh()
    losses = [step(*batch) for batch in images(6)]
    assert len({float(loss) for loss in losses}) == 6
    assert step.mode == "graphed"
    assert step.skipped is None


class Reading(nn.Module):
    def forward(self, x):
        return x * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


def test_auto_leaves_out_what_cannot_be_recorded(software):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), Reading(), nn.Linear(4, 3))

    runs = [trained(made(mode), network=network) for mode in ("eager", "auto")]
    assert same(*runs)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # not fused
    step = lowcal.make_step(model, optimizer, F.cross_entropy)
    step(*images(1)[0])
    assert step.mode == "eager"


def test_many_sizes_of_batch_do_not_fill_the_memory(software, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 2)
    software.recorded = 0
    ends = []
    for mode in ("eager", "graphed"):
        model, _, step = fresh(mode)
        for _ in range(4):
            for size in (2, 3, 4, 5):
                step(*(tensor[:size] for tensor in images(1)[0]))
        ends.append(weights(model))
    assert same(*ends)
    assert software.recorded == 2


def test_a_network_with_several_inputs_and_another_loss(software):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    ends = []
    for mode in ("eager", "graphed"):
        torch.manual_seed(0)
        model = Two()
        step = lowcal.make_step(model, OPTIMIZERS["Adam"](model.parameters()), F.mse_loss, mode=mode)
        for _ in range(5):
            step(torch.rand(6, 3), torch.rand(6, 4), torch.rand(6, 2))
        ends.append(weights(model))
    torch.testing.assert_close(*ends)


def test_it_skips_a_step_whose_gradient_overflows(software):
    model, _, step = fresh(scaler=torch.amp.GradScaler("cpu"))
    inputs, targets = images(1)[0]
    for _ in range(4):
        step(inputs, targets)
    before = {name: value.clone() for name, value in model.named_parameters()}
    step(inputs * torch.inf, targets)
    assert bool(step.skipped)
    assert same(before, dict(model.named_parameters()))


CASES = {
    "no mode": (lambda m, o: {"mode": "graph"}, "there is no mode 'graph'; did you mean 'graphed'"),
    "device": (lambda m, o: {"mode": "graphed"}, "'graphed' needs a CUDA device, and this network is on cpu"),
    "blocks": (lambda m, o: {"model": nn.Linear(2, 2), "mode": "compiled"}, "Linear has no block of layers to compile"),
    "loss": (lambda m, o: {"loss_fn": None}, "loss_fn is None; give a function"),
    "max_norm": (lambda m, o: {"max_norm": 0}, "max_norm is 0; give a number above 0"),
    "accumulate": (lambda m, o: {"accumulate": 1.5}, "accumulate is 1.5; give a whole number"),
    "no parameters": (lambda m, o: {"model": nn.ReLU()}, "ReLU is on no parameters; it must be on one device"),
    "optimizer": (lambda m, o: {"optimizer": "sgd"}, "str is not a torch optimizer"),
    "another model": (
        lambda m, o: {"local": lowcal.LoCal(m, o, epochs=2), "model": convnet()},
        "local controls another model; give the model that LoCal was built with",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_changes_nothing(case):
    model = convnet()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    changes, message = CASES[case]
    given = {"model": model, "optimizer": optimizer, "loss_fn": F.cross_entropy, **changes(model, optimizer)}
    before = dict(optimizer.state_dict()), weights(model)
    with pytest.raises(LowcalError) as error:
        lowcal.make_step(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert same(before, (dict(optimizer.state_dict()), weights(model)))


def test_a_controller_must_be_given():
    model = convnet()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with lowcal.LoCal(model, optimizer, epochs=2), pytest.raises(LowcalError, match="the model learns under a LoCal"):
        lowcal.make_step(model, optimizer, F.cross_entropy)
    lowcal.make_step(model, optimizer, F.cross_entropy)  # detached


def test_a_mini_batch_on_another_device_is_named():
    _, _, step = fresh("eager")
    inputs, targets = images(1)[0]
    with pytest.raises(LowcalError, match="the step got a tensor on meta; give tensors on cpu, where the network is"):
        step(inputs.to("meta"), targets)


def test_the_page_s_example_runs():
    page = (Path(__file__).parents[2] / "docs" / "step.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["local"].boundary == 1
    assert names["step"].mode in ("eager", "graphed")
