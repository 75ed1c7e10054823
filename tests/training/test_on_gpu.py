"""Whole runs on a CUDA GPU: graphs beside eager steps, memory, a batch that does not fit, the choice of the step."""

import gc

import pytest
import torch
from torch import nn

from lowcal.data.mixing import Mixing
from lowcal.experiments.backends import kernels
from lowcal.methods import METHODS
from lowcal.training.epoch_state import EpochState

from .runs import log, make_run, network, run_on, settings
from .test_batch_growth import growing

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TUNED = {"ema_decay": 0.9, "warmup_epochs": 1.5, "mixing": Mixing(3, 0.4, 1.0), "label_smoothing": 0.1}
RECORDED = [name for name, method in METHODS.items() if method.unreplayable is None]


@pytest.fixture(autouse=True)
def _deterministic():
    with kernels(deterministic=True):
        yield


def run_of(path, step, method="local", **options):
    local = settings(every=2, refresh_every=3)
    return make_run(path, method, step=step, device=DEVICE, fused=True, local=local, **options)


def losses(run):
    return torch.tensor([[record["train_loss"], record["test_loss"]] for record in log(run)])


@pytest.mark.parametrize(("method", "options"), [*((method, {}) for method in RECORDED), ("local", TUNED)])
def test_a_graphed_run_is_the_eager_one(tmp_path, method, options):
    eager, graph = (run_on(run_of(tmp_path / s, s, method, epochs=5, **options)) for s in ("eager", "graphed"))
    assert [record["boundary"] for record in log(graph)] == [record["boundary"] for record in log(eager)]
    torch.testing.assert_close(losses(graph), losses(eager), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(graph.model.state_dict(), eager.model.state_dict(), rtol=1e-2, atol=1e-2)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path):
    options = {"step": "graphed", "checkpoint_minutes": 1e-9}
    whole = run_on(run_of(tmp_path / "whole", **options))
    run_on(run_of(tmp_path / "parts", **options), 3)
    again = run_of(tmp_path / "parts", **options)
    again.resume()
    torch.testing.assert_close(losses(run_on(again)), losses(whole), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"max_skips": 3}, TUNED], ids=["guarded", "tuned"])
@pytest.mark.parametrize("step", ["eager", "graphed"])
def test_no_step_waits_for_the_device(tmp_path, step, options):
    run = run_on(run_of(tmp_path / "run", step, **options), 2)  # the second, like the one to come, has a local layer
    drawn, epoch = run.train.raw_batches(), EpochState(len(run.train), run.options.device)
    step, first = run._steps.step, next(drawn)  # with it all that an epoch draws comes to the device
    run.model.train()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for given in (first, *drawn):
            epoch.add(step(*given), step.skipped, (len(given[0]),), 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert epoch.done == len(run.train)


def test_graphs_are_gone_after_a_move(tmp_path):
    run = run_on(run_of(tmp_path / "run", "graphed", epochs=9), 1)
    held = []
    for _ in range(4):
        run.method.move_to(run.method.boundary + 1)
        run._loop.rebuild()
        run.run_epoch()
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[0]


def test_memory_of_graphs_is_measured_as_that_of_eager_steps(tmp_path):
    peaks = {}
    for step in ("eager", "graphed"):
        run = run_on(run_of(tmp_path / step, step, "sgd", epochs=3))
        peaks[step] = [record["peak_memory_bytes"] for record in log(run)]
    assert peaks["graphed"][0] <= peaks["graphed"][1] == peaks["graphed"][2]  # replays alone, in the last one
    assert 0.8 * peaks["eager"][0] <= peaks["graphed"][2] <= 2 * peaks["eager"][0]


@pytest.mark.parametrize(("step", "place"), [("eager", 1), ("eager", 2), ("graphed", 1), ("graphed", 3)])
def test_memory_that_really_runs_out_takes_the_batch_back(tmp_path, step, place):
    """Also while a step is recorded, which is the third time that Python runs one of its kind."""
    passes = []

    def fill(model, inputs, scores):
        if model.training and torch.is_grad_enabled() and not scores.is_meta and len(scores) == 10:
            passes.append(len(passes) + 1)
            if passes[-1] == place:
                return torch.empty(2**50, dtype=torch.uint8, device=scores.device)
        return None

    torch.manual_seed(0)
    model = network()
    model.register_forward_hook(fill)
    grown = run_of(tmp_path / "grown", step, "freeze", model=model, growth=growing(most=10), images_count=60)
    plain = run_of(tmp_path / "plain", step, "freeze", images_count=60)
    run_on(grown)
    assert len(passes) >= place
    assert [record["refused_batch"] for record in log(grown)] == [None, None, 10, 10, 10, 10]
    torch.testing.assert_close(losses(grown), losses(run_on(plain)), rtol=1e-3, atol=1e-3)


def test_auto_keeps_one_way_for_the_whole_run(tmp_path):
    run = run_of(tmp_path / "run", "auto", "sgd", epochs=2)
    run.warm_up()
    (step,) = {record["step"] for record in log(run_on(run))}
    assert step in ("eager", "compiled", "graphed")


class Reading(nn.Module):
    """Reads from the device, so that no graph can hold it, and no compiled block either."""

    def forward(self, x):
        if x.is_meta:  # tracing, and dry runs
            return x
        return x * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


def test_auto_goes_on_where_no_graph_can_be_recorded(tmp_path):
    eager, chosen = (run_of(tmp_path / step, step, model=reading(), epochs=3) for step in ("eager", "auto"))
    chosen.warm_up()
    run_on(eager), run_on(chosen)
    assert {record["step"] for record in log(chosen)} <= {"eager", "compiled"}
    torch.testing.assert_close(losses(chosen), losses(eager), rtol=1e-3, atol=1e-3)


def reading():
    torch.manual_seed(0)
    model = network()
    model.drop = nn.Sequential(Reading(), nn.Dropout(0.3))
    return model
