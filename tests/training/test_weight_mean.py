"""The mean of the weights: its values, what is evaluated and exported with it, and its continuation."""

import signal

import pytest
import torch

from lowcal import LowcalError
from lowcal.data.mixing import Mixing
from lowcal.methods import METHODS
from lowcal.steps import graphed
from lowcal.training.checkpoint import load_checkpoint
from lowcal.training.evaluation import evaluate
from lowcal.training.signals import Interrupted, catch_signals
from lowcal.training.weight_mean import WeightMean

from ..steps.software_graphs import SoftwareGraphs
from ..support import same
from .runs import log, make_run, network, outcome, run_on, spoilt, state

CPU = torch.device("cpu")
EACH_STEP = 1e-9  # minutes
KEPT_SHAPES = [name for name, method in METHODS.items() if not method.reshapes]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def averaged_run(path, method="local", **options):
    return make_run(path, method, ema_decay=0.8, **options)


def mixed_run(path, method="local", **options):
    return averaged_run(path, method, mixing=Mixing(3, 0.4, 1.0), label_smoothing=0.1, **options)


def whole_state(run):
    return {**state(run), "mean": run.state.train.mean.state_dict()}


@pytest.mark.parametrize("method", KEPT_SHAPES)
def test_the_mean_is_the_weighted_sum_of_the_weights_after_each_step(tmp_path, method):
    """The weights of step k in the mean of n steps are (1 - d_k) d_(k+1) ... d_n, summed in double precision."""
    run = averaged_run(tmp_path / "run", method)
    seen = [weights(run.model)]
    step = run._steps._build_step  # a wrapper inside of the one that averages

    def watched(*args):
        inner = step(*args)

        class Watched:
            skipped = None

            def __call__(self, *batch):
                loss = inner(*batch)
                seen.append(weights(run.model))
                return loss

        return Watched()

    run._steps._build_step = watched
    run._loop.rebuild()
    run_on(run, 3)
    steps = len(seen) - 1
    assert steps == 15
    decays = [min(0.8, n / (n + 9)) for n in range(1, steps + 1)]
    expected = {name: value.double() for name, value in seen[0].items()}
    for decay, now in zip(decays, seen[1:], strict=True):
        expected = {name: decay * value + (1 - decay) * now[name].double() for name, value in expected.items()}
    mean = run.state.train.mean.state_dict()
    assert mean["steps"] == steps
    for name, value in mean["tensors"].items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    floating = {name for name, value in seen[0].items() if value.is_floating_point()}
    assert mean["tensors"].keys() == floating < seen[0].keys()  # the batches that normalisation counts are left out


def test_the_network_is_evaluated_and_exported_as_the_mean_and_trained_as_it_is(tmp_path):
    run = run_on(averaged_run(tmp_path / "run"))
    plain = run_on(make_run(tmp_path / "plain"))
    assert same(weights(run.model), weights(plain.model))
    for name in ("train_loss", "boundary", "sign", "lr"):
        assert [r[name] for r in log(run)] == [r[name] for r in log(plain)]
    assert [r["test_loss"] for r in log(run)] != [r["test_loss"] for r in log(plain)]
    run.finish()
    exported = torch.load(tmp_path / "run/model.pt")
    for name, value in run.state.train.mean.state_dict()["tensors"].items():
        assert torch.equal(exported[name], value)
        assert not torch.equal(value, plain.model.state_dict()[name])
    model = network()
    model.load_state_dict(exported)
    loss, error = evaluate(model, run._loop.test, device=CPU, precision="float32")
    assert (loss, error) == (log(run)[-1]["test_loss"], log(run)[-1]["top1_error"])
    assert log(run)[0]["peak_memory_bytes"] - log(plain)[0]["peak_memory_bytes"] == run.state.train.mean.nbytes


def test_two_exchanges_give_the_weights_back_to_the_bit_where_they_are(tmp_path):
    model = network()
    mean = WeightMean(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    mean.update()
    before, places = weights(model), [p.data_ptr() for p in model.parameters()]
    with mean.exchanged():
        assert not same(before, weights(model))
        with mean.exchanged():
            assert same(before, weights(model))
    assert same(before, weights(model))
    assert places == [p.data_ptr() for p in model.parameters()]


def test_a_tied_weight_has_one_mean():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    mean = WeightMean(model, 0.5)
    torch.nn.init.ones_(first.weight)
    before = weights(model)
    with mean.exchanged():
        assert not torch.equal(second.weight, before["1.weight"])
    assert same(before, weights(model))


@pytest.mark.parametrize("method", KEPT_SHAPES)
def test_a_run_broken_off_in_an_epoch_goes_on_to_the_bit(tmp_path, method):
    one = run_on(mixed_run(tmp_path / "one", method, epochs=4))

    def broken_off(scores):
        raise KeyboardInterrupt

    model = spoilt(5 * 2 + 3, spoil=broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_on(mixed_run(tmp_path / "two", method, epochs=4, model=model, checkpoint_minutes=EACH_STEP))
    torch.manual_seed(99)
    two = mixed_run(tmp_path / "two", method, epochs=4)
    two.resume()
    two.warm_up()
    assert two.finished_steps == 2
    assert same(whole_state(one), whole_state(run_on(two)))


def test_a_signal_during_evaluation_saves_the_weights_and_not_their_mean(tmp_path):
    one = run_on(averaged_run(tmp_path / "one"), 2)
    model = spoilt(3, spoil=lambda scores: signal.raise_signal(signal.SIGTERM), training=False)
    run = averaged_run(tmp_path / "two", model=model)
    with catch_signals(), pytest.raises(Interrupted):
        run_on(run)
    assert run.finished == 1
    assert same(load_checkpoint(tmp_path / "two").state["model"], weights(run.model))
    two = averaged_run(tmp_path / "two")
    two.resume()
    assert same(whole_state(one), whole_state(run_on(two, 1)))


def test_recorded_steps_have_the_same_mean_and_the_same_mixed_images(tmp_path, monkeypatch):
    eager = run_on(mixed_run(tmp_path / "eager", fused=True))
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    recorded = run_on(mixed_run(tmp_path / "graphed", fused=True, step="graphed"))
    assert same(outcome(eager), outcome(recorded))
    assert same(whole_state(eager)["mean"], whole_state(recorded)["mean"])


def test_a_checkpoint_with_the_mean_of_another_network_is_refused():
    mean, other = WeightMean(network(), 0.9), WeightMean(torch.nn.Linear(2, 2), 0.9)
    with pytest.raises(LowcalError, match=r"has no 'stem\.weight' of shape \(4, 2, 3, 3\)"):
        mean.load_state_dict(other.state_dict())
