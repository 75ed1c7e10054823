"""The graphed step: on CPU with graphs in software (`software_graphs`), on CUDA with real ones."""

import pytest
import torch
from torch import nn

from lowcal import LowcalError
from lowcal.experiments.backends import kernels
from lowcal.method_settings import LocalSettings, ScheduleSettings
from lowcal.methods import METHODS, build_method
from lowcal.steps import graphed
from lowcal.steps.graphed import GraphedStep
from lowcal.steps.step import EagerStep, StepOptions, build_scaler

from ..networks import images
from ..support import same
from ..training.runs import OTHER_SETTINGS, log, make_run, network, outcome, run_on, settings, spoilt, state
from .software_graphs import SoftwareGraphs
from .test_compiled import attached

CPU = torch.device("cpu")
OPTIONS = StepOptions(CPU)
RECORDED = [name for name, method in METHODS.items() if method.unreplayable is None]


@pytest.fixture
def software(monkeypatch):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    monkeypatch.setattr(SoftwareGraphs, "recorded", 0)
    return SoftwareGraphs


@pytest.mark.parametrize("method", RECORDED)
def test_a_run_is_bitwise_the_eager_one(tmp_path, software, method):
    """Forty steps with two moves (or channels removed), new rates and signs in each epoch, and smaller last batches."""
    local = settings(every=2, refresh_every=3, decay_every=2)
    runs = [
        run_on(make_run(tmp_path / step, method, epochs=8, local=local, step=step, fused=True))
        for step in ("eager", "graphed")
    ]
    assert same(*map(outcome, runs))
    assert software.recorded > 0
    if method == "local":
        assert {record["sign"] for record in log(runs[0])} == {1, -1}
        # Boundary 0 and both sizes of batch, then twice both kinds of step and both sizes, some of them seen only once.
        assert software.recorded <= 2 + 2 * 2 * 2


@pytest.mark.parametrize("guard", [True, False])
def test_other_readings_of_the_paper_are_bitwise_alike_too(tmp_path, software, guard):
    """Norms of steps, a sign that is kept and a step for each layer lie on the device; skipped steps do not count."""
    schedule = ScheduleSettings(alpha=1.2, shift=1, interval=2, spacing="prose", measure="step", average="run")
    local = LocalSettings(lr=0.05, decay_every=1, decay_from="switch", sign="kept", schedule=schedule)
    runs = []
    for step in ("eager", "graphed"):
        model = spoilt(*range(1, 99) if guard else (), spoil=lambda x: x / (x[0, 0] < x[1, 0]).float())
        options = {"model": model, "max_skips": 20 if guard else 0, "fused": True, "epochs": 8, "images_count": 33}
        runs.append(run_on(make_run(tmp_path / step, local=local, step=step, **options)))
    assert same(*map(outcome, runs))
    assert software.recorded > 0
    assert len({record["boundary"] for record in log(runs[0])}) >= 3
    assert len({record["local_lr"] for record in log(runs[0])}) >= 2
    assert bool(sum(record["skipped_steps"] for record in log(runs[0]))) is guard


@pytest.mark.parametrize(("precision", "guard"), [("float32", True), ("bf16", False), ("fp16", True), ("fp16", False)])
def test_mixed_precision_and_skipped_steps(tmp_path, software, precision, guard):
    runs = []
    for step in ("eager", "graphed"):
        places = range(1, 99) if guard else ()
        # Baked into a graph as any of Python's conditions is: so it is one on the data.
        model = spoilt(*places, spoil=lambda scores: scores / (scores[0, 0] < scores[1, 0]).float())
        options = {"precision": precision, "max_skips": 20 if guard else 0, "fused": True, "epochs": 4}
        runs.append(run_on(make_run(tmp_path / f"{step}", model=model, step=step, **options)))
    assert same(*map(outcome, runs))
    assert software.recorded > 0
    skipped = [record["skipped_steps"] for record in log(runs[0])]
    assert bool(sum(skipped)) is guard


def test_it_resumes_exactly_within_an_epoch_too(tmp_path, software):
    options = {"step": "graphed", "fused": True, "checkpoint_minutes": 1e-9, "local": settings(every=2)}
    whole = run_on(make_run(tmp_path / "whole", **options))
    run_on(make_run(tmp_path / "parts", **options), 4)
    again = make_run(tmp_path / "parts", **options)
    again.resume()
    again.warm_up()
    assert same(state(whole), state(run_on(again)))


def test_learning_rates_stay_numbers(tmp_path, software):
    run = run_on(make_run(tmp_path / "run", step="graphed", fused=True), 3)
    assert [type(group["lr"]) for group in run.optimizer.param_groups] == [float]
    assert set(run.method.state_dict()) == set(make_run(tmp_path / "other").method.state_dict())


def test_a_graph_is_recorded_once_for_each_kind_of_step(software):
    model = network()
    optimizer, method = attached(model, every=3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    method.move_to(3)
    step = GraphedStep(model, (optimizer,), method, OPTIONS)
    counts = []
    for batch in images(9):
        step(*batch)
        counts.append(software.recorded)
    # Steps 0, 3 and 6 make updates: the first two of a kind run eagerly, the third is recorded.
    assert counts == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_local_updates_left_out_are_counted(software):
    losses = []
    for kind in (EagerStep, GraphedStep):
        torch.manual_seed(0)
        model = network()
        optimizer, method = attached(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
        method.move_to(1)
        step = kind(model, (optimizer,), method, OPTIONS)
        for inputs, labels in images(5):
            step(torch.zeros_like(inputs), labels)  # a stem of no bias would give no update; this one's bias does
        with torch.no_grad():
            model.stem.weight.zero_(), model.stem.bias.zero_()
        for batch in images(3):
            step(*batch)
        method.end_epoch(1.0)
        losses.append(method.facts()["skipped_updates"])
    assert losses == [8, 8]


def test_reading_from_the_device_is_named(software):
    class Reading(nn.Module):
        def forward(self, x):
            return x * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)

    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), Reading(), nn.Linear(4, 3))
    optimizer, method = attached(model, "sgd", optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    step = GraphedStep(model, (optimizer,), method, OPTIONS)
    step(*images(1)[0])
    with pytest.raises(LowcalError, match=r"cannot be recorded as a CUDA graph \(.*\); use the step 'eager'") as error:
        step(*images(1)[0])
    assert "\n" not in str(error.value)
    assert software.recorded == 0  # found before anything is recorded, which would leave torch in disorder


def test_what_cannot_be_recorded_is_refused(software):
    model = network()
    optimizer, method = attached(model, "sgd")
    with pytest.raises(LowcalError, match="cannot run SGD as it is; build SGD, Adam or AdamW with fused=True"):
        GraphedStep(model, (optimizer,), method, OPTIONS)


def test_stochastic_depth_is_refused(tmp_path, software):
    with pytest.raises(LowcalError, match="cannot run stochastic-depth: other blocks run in each step; use 'eager'"):
        make_run(tmp_path / "run", "stochastic-depth", step="graphed", fused=True)


def test_it_needs_cuda():
    model = network()
    optimizer, method = attached(model, "sgd")
    with pytest.raises(LowcalError, match="needs a CUDA device, and this network is on cpu; use 'eager' or 'compiled'"):
        GraphedStep(model, (optimizer,), method, OPTIONS)


def on_cuda(kind, name, *, precision="float32", guard=False, steps=50, **values):
    """The losses of `steps` steps with two moves, new rates, and the state at the end."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = network().to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    example = torch.zeros(1, 2, 6, 6, device=device)
    local = settings(every=2, refresh_every=3, decay_every=1, **values)
    method = build_method(name, model, optimizer, OTHER_SETTINGS.get(METHODS[name].section, local), epochs=9,
                          example_inputs=example)  # fmt: skip
    scaler = build_scaler(device, precision)
    batches = [(x.to(device), y.to(device)) for x, y in images(steps, seed=3)]
    losses = []
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = float(torch.tensor(0.1 * 0.7**epoch))  # a graph has it in single precision
        step = kind(model, (optimizer,), method, StepOptions(device, precision, scaler, guard=guard))
        own = [step(*batch).clone() for batch in batches[epoch * steps // 5 : (epoch + 1) * steps // 5]]
        losses += own
        method.end_epoch(float(torch.stack(own).mean()))
    return torch.stack(losses), {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("method", RECORDED)
@pytest.mark.parametrize(("precision", "guard"), [("float32", False), ("bf16", False), ("fp16", False), ("fp16", True)])
def test_cuda_graphs_give_eager_s_losses(method, precision, guard):
    with kernels(deterministic=True):
        eager, graph = (on_cuda(kind, method, precision=precision, guard=guard) for kind in (EagerStep, GraphedStep))
    torch.testing.assert_close(graph[0], eager[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(graph[1], eager[1], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_nothing_waits_for_the_device_once_recorded():
    device = torch.device("cuda")
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    example = torch.zeros(1, 2, 6, 6, device=device)
    method = build_method("local", model, optimizer, settings(every=2), epochs=9, example_inputs=example)
    method.move_to(3)
    step = GraphedStep(model, (optimizer,), method, StepOptions(device, "bf16", guard=True))
    batches = [(x.to(device), y.to(device)) for x, y in images(8)]
    for batch in batches:
        step(*batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
