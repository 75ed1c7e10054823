import copy
import json

import pytest
import torch
from torch import nn

import lowcal.training.train_state as run_state
from lowcal import LowcalError
from lowcal.methods import METHODS
from lowcal.training.epoch import Progress

from ..support import hooks, same, snapshot
from .runs import log, make_run, network, run_on, settings, spoilt, state


def broken_off(scores):
    raise KeyboardInterrupt


def test_the_methods_do_in_these_runs_what_they_are_there_for(whole):
    whole = {name: found[0] for name, found in whole.items()}
    plain = whole["sgd"]["model"]
    assert whole["local"]["learning"]["two.conv1.weight"] is False
    assert {name: value.shape for name, value in whole["prune"]["model"].items()} != {
        name: value.shape for name, value in plain.items()
    }
    assert len({log[-1]["train_loss"] for log in (state["log"] for state in whole.values())}) == len(METHODS)


def test_a_run_resumed_at_its_end_is_done(tmp_path, whole):
    run_on(make_run(tmp_path / "run"))
    run = make_run(tmp_path / "run")
    run.resume()
    assert run.done
    assert same(state(run), whole["local"][0])
    with pytest.raises(LowcalError, match="has finished its 6 epochs"):
        run.run_epoch()


@pytest.mark.parametrize("method", ["stochastic-depth", "prune"])
def test_interleaved_runs_are_bitwise_those_alone(tmp_path, whole, method):
    runs = [make_run(tmp_path / "first", method), make_run(tmp_path / "second", "local", seed=1)]
    for _ in range(6):
        for run in runs:
            run.run_epoch()
    assert same(state(runs[0]), whole[method][0])
    assert not same(state(runs[1])["model"], whole["local"][0]["model"])


def test_a_run_leaves_the_global_generators_alone(tmp_path):
    run = make_run(tmp_path / "run")
    before = torch.get_rng_state()
    run.warm_up()
    run.run_epoch()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["local", "stochastic-depth", "prune"])
def test_warming_up_moves_nothing(tmp_path, whole, method):
    run = make_run(tmp_path / "run", method)
    for epoch in range(6):
        if epoch in (0, 2):
            before = snapshot(run.model, run.optimizer), copy.deepcopy(run.method.state_dict())
            run.warm_up()
            assert same((snapshot(run.model, run.optimizer), run.method.state_dict()), before)
        run.run_epoch()
    assert same(state(run), whole[method][0])


def test_a_record_says_what_the_epoch_did(tmp_path):
    run = run_on(make_run(tmp_path / "run"))
    records = run.folder.read_epochs()
    assert [record["epoch"] for record in records] == list(range(6))
    assert [record["boundary"] for record in records] == [0, 1, 1, 4, 4, 4]
    assert [record["steps"] for record in records] == [5] * 6
    assert {record["batch"] for record in records} == {5}
    assert {record["layers"] for record in records} == {7}
    assert [record["lr"] for record in records] == [0.1 * 0.7**epoch for epoch in range(6)]
    assert records[-1]["total_seconds"] == pytest.approx(sum(record["seconds"] for record in records))
    assert all(record["flops"] > 0 and record["peak_memory_bytes"] > 0 for record in records)
    assert records[0]["flops"] > records[1]["flops"] > records[3]["flops"]
    assert records[0]["peak_memory_bytes"] > records[3]["peak_memory_bytes"]
    assert {record["local_lr"] for record in records} == {0.05}
    assert {record["sign"] for record in records} <= {1, -1}
    assert all(record["transition_change"] > 0 for record in records)
    assert all(record["images_per_second"] == pytest.approx(22 / record["seconds"]) for record in records)


def test_the_training_loss_is_the_mean_over_images(tmp_path):
    run = make_run(tmp_path / "run", "sgd", lr_at=lambda epoch: 0.0)
    seen = []

    def watch(module, inputs, scores):
        if module.training and torch.is_grad_enabled() and not scores.is_meta:
            seen.append(scores.detach())

    run.model.register_forward_hook(watch)
    before = run.train.state_dict()
    record = run.run_epoch()
    run.train.load_state_dict(before)
    labels = torch.cat([labels for _, labels in run.train])
    expected = nn.functional.cross_entropy(torch.cat(seen).double(), labels)
    assert record["train_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_progress_ends_with_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("lowcal.training.epoch.SHOW_EVERY", 0.0)
    run = make_run(tmp_path / "run", epochs=3)
    shown: list[Progress] = []
    run.run_epoch(shown.append)
    run.run_epoch(shown.append)
    assert [(p.epoch, p.step, p.steps, p.boundary) for p in shown] == [
        *((0, step, 5, 0) for step in range(1, 6)),
        *((1, step, 5, 1) for step in range(1, 6)),
    ]
    assert all(p.loss > 0 and p.images_per_second > 0 and p.layers == 7 and p.epochs == 3 for p in shown)
    assert shown[-1].seconds_left > 0
    run.run_epoch(shown.append)
    assert shown[-1].seconds_left == 0


def test_the_summary_is_of_all_epochs(tmp_path):
    run = make_run(tmp_path / "run", epochs=3)
    run.run_epoch()
    with pytest.raises(LowcalError, match="1 of 3 epochs"):
        run.finish()
    run_on(run)
    summary = run.finish()
    records = run.folder.read_epochs()
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1_error"] == records[-1]["top1_error"]
    assert summary["best_top1_error"] == min(record["top1_error"] for record in records)
    assert summary["flops"] == sum(record["flops"] for record in records)
    assert (summary["method"], summary["boundary"], summary["layers"]) == ("local", 1, 7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, whole, value):
    run = make_run(tmp_path / "run", model=spoilt(5 * 2 + 3, spoil=lambda scores: scores * value))
    run_on(run, 2)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(LowcalError, match=r"became nan at step 3 of epoch 3 of 6; lower the learning rate") as error:
        run.run_epoch()
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert len(log(run)) == 2
    with pytest.raises(LowcalError, match="interrupted inside an epoch"):
        run.run_epoch()
    again = make_run(tmp_path / "run")
    again.resume()
    assert same(state(run_on(again)), whole["local"][0])


def test_a_test_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = make_run(tmp_path / "run", "sgd", model=spoilt(2, spoil=lambda scores: scores * torch.nan, training=False))
    with pytest.raises(LowcalError, match="test loss is nan"):
        run.run_epoch()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_diverging_learning_rate_is_named(tmp_path):
    run = make_run(tmp_path / "run", "sgd", lr_at=lambda epoch: 1e30)
    with pytest.raises(LowcalError, match=r"lower the learning rate, which is 1e\+30 \(nothing is saved\)"):
        run.run_epoch()


@pytest.mark.parametrize(("method", "steps"), [("local", 1), ("prune", 5 * 3 + 1)])
def test_an_interrupted_run_goes_on_from_the_last_epoch(tmp_path, whole, method, steps):
    run = make_run(tmp_path / "run", method, model=spoilt(steps, spoil=broken_off))
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    assert torch.equal(torch.get_rng_state(), before)
    again = make_run(tmp_path / "run", method)
    notes = again.resume()
    assert again.finished == steps // 5
    assert notes == (() if again.finished else ("no epoch had been finished; started from the first",))
    assert same(state(run_on(again)), whole[method][0])


@pytest.mark.parametrize("finished", [0, 2])
def test_a_crash_between_record_and_checkpoint_loses_nothing(tmp_path, whole, monkeypatch, finished):
    run = run_on(make_run(tmp_path / "run"), finished)
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_checkpoint", lambda folder, state: broken_off(None))
        with pytest.raises(KeyboardInterrupt):
            run.run_epoch()
    assert len(log(run)) == finished + 1
    again = make_run(tmp_path / "run")
    again.resume()
    assert len(log(again)) == finished
    assert same(state(run_on(again)), whole["local"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "freeze"}, "its method is 'local', this run's is 'freeze'"),
        ({"seed": 3}, "its seed is 0, this run's is 3"),
        ({"epochs": 9}, "its epochs is 6, this run's is 9"),
        ({"model": nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3))}, "does not fit this run"),
        ({"model": nn.Sequential(network(), nn.Linear(3, 3))}, "does not fit this run"),
        ({"precision": "fp16"}, "does not fit this run"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path, change, message):
    run_on(make_run(tmp_path / "run", local=settings({1: 1})), 2)
    run = make_run(tmp_path / "run", local=settings({1: 1}), **change)
    lines = (tmp_path / "run" / "epochs.jsonl").read_bytes()
    before = snapshot(run.model, run.optimizer), run.method.state_dict(), run.train.state_dict()
    with pytest.raises(LowcalError, match=message) as error:
        run.resume()
    assert "\n" not in str(error.value)
    assert same((snapshot(run.model, run.optimizer), run.method.state_dict(), run.train.state_dict()), before)
    assert (tmp_path / "run" / "epochs.jsonl").read_bytes() == lines
    assert run.finished == 0


def test_an_edited_recipe_is_refused(tmp_path):
    run_on(make_run(tmp_path / "run"), 1)
    (tmp_path / "run" / "recipe.yaml").write_text("name: other\n")
    with pytest.raises(LowcalError, match="its recipe differs"):
        make_run(tmp_path / "run").resume()


def test_a_log_without_its_checkpoint_is_refused(tmp_path):
    run_on(make_run(tmp_path / "run", checkpoint=False), 2)
    with pytest.raises(LowcalError, match="has no checkpoint"):
        make_run(tmp_path / "run").resume()


def test_a_checkpoint_without_its_log_is_refused(tmp_path):
    run_on(make_run(tmp_path / "run"), 3)
    (tmp_path / "run" / "epochs.jsonl").write_bytes(b"")
    with pytest.raises(LowcalError, match="does not fit this run"):
        make_run(tmp_path / "run").resume()


@pytest.mark.parametrize("method", ["local", "stochastic-depth"])
def test_running_leaves_no_hooks_but_the_methods(tmp_path, method):
    run = make_run(tmp_path / "run", method, epochs=4)
    before = hooks(run.model, run.optimizer)
    run.warm_up()
    assert hooks(run.model, run.optimizer) == before
    run_on(run)
    run.method.detach()
    plain = network()
    assert hooks(run.model, run.optimizer) == hooks(plain, type(run.optimizer)(plain.parameters(), lr=1.0))


def test_a_warm_up_raises_the_rate_step_by_step_to_the_one_of_the_schedule(tmp_path):
    """Five steps an epoch; the warm-up ends with the eighth."""
    rates = []
    run = make_run(tmp_path / "run", "sgd", lr_at=lambda epoch: 0.1, warmup_epochs=1.6)
    run.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"]))
    run_on(run, 3)
    assert rates == pytest.approx([0.1 * min(1, step / 8) for step in range(1, 16)])
    assert [record["lr"] for record in log(run)] == pytest.approx([0.1 * 5 / 8, 0.1, 0.1])
