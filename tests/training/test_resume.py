"""Runs that end inside an epoch, by a crash or by a signal, and go on."""

import signal
from contextlib import suppress

import pytest
import torch

from lowcal import LowcalError
from lowcal.data.mixing import Mixing
from lowcal.methods import METHODS
from lowcal.training.checkpoint import load_checkpoint
from lowcal.training.signals import Interrupted, catch_signals, deferred, requested

from ..support import same
from .runs import make_run, run_on, settings, spoilt, state, untimed

EACH_STEP = 1e-9  # minutes


def broken_off(scores):
    raise KeyboardInterrupt


def sends(number):
    def send(scores):
        signal.raise_signal(number)

    return send


def goes_on(path, method="local", **options):
    """The run in `path`, resumed in what might be another process."""
    torch.manual_seed(99)
    run = make_run(path, method, **options)
    assert run.resume() == ()
    run.warm_up()
    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [5 * 3 + 2])
def test_a_run_killed_inside_an_epoch_is_bitwise_the_uninterrupted_one(tmp_path, whole, method, steps):
    run = make_run(tmp_path / "run", method, model=spoilt(steps + 1, spoil=broken_off), checkpoint_minutes=EACH_STEP)
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    run = goes_on(tmp_path / "run", method)
    assert (run.finished, run.finished_steps) == divmod(steps, 5)
    run_on(run)
    assert same((state(run), untimed(run.finish())), whole[method])


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"precision": "fp16", "fused": True},
        {"local": settings({})},
        {"local": settings(norm_stats="running")},
        {"local": settings(every=3, scale="relative", decay_every=2)},
        {"max_skips": 2, "fused": True},
        {"warmup_epochs": 3.5},
        {"ema_decay": 0.9, "mixing": Mixing(3, 0.4, 1.0), "label_smoothing": 0.1},
    ],
    ids=["fp16", "fused fp16", "norm-trend", "running", "every", "guard", "warm-up", "mixed"],
)
def test_it_is_so_in_every_setting_at_an_epoch_s_end_too(tmp_path, options):
    steps = 5 * 2 + 3
    one = run_on(make_run(tmp_path / "one", **options))
    model = spoilt(steps + 1, spoil=broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_on(make_run(tmp_path / "two", model=model, checkpoint_minutes=EACH_STEP, **options))
    two = goes_on(tmp_path / "two", **options)
    assert two.finished_steps == steps % 5
    run_on(two, 1)
    assert same(state(one), state(run_on(goes_on(tmp_path / "two", **options))))


def test_a_run_that_is_resumed_after_every_step_is_the_same(tmp_path, whole):
    for _ in range(2 * 5):
        run = make_run(tmp_path / "run", model=spoilt(2, spoil=broken_off), checkpoint_minutes=EACH_STEP)
        run.resume()
        with suppress(KeyboardInterrupt):
            run_on(run)
    run = goes_on(tmp_path / "run")
    assert run.finished == 2
    assert same(state(run_on(run)), whole["local"][0])


def test_what_was_saved_last_is_passed_over_when_damaged(tmp_path, whole):
    run = make_run(tmp_path / "run", model=spoilt(5 * 2 + 4, spoil=broken_off), checkpoint_minutes=EACH_STEP)
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1])
    run = make_run(tmp_path / "run")
    (note,) = run.resume()
    assert str(path) in note
    assert (run.finished, run.finished_steps) == (2, 2)
    assert same(state(run_on(run)), whole["local"][0])


def test_checkpoints_within_an_epoch_come_by_the_clock(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("lowcal.training.train_state.save_checkpoint", lambda folder, state: saved.append(state))
    for minutes, count in ((None, 1), (10.0, 1), (EACH_STEP, 6)):
        run_on(make_run(tmp_path / str(minutes), checkpoint_minutes=minutes), 1)
        assert len(saved) == count
        saved.clear()


def test_times_of_before_count_and_those_of_saving_do_not(tmp_path):
    run = make_run(tmp_path / "run", model=spoilt(4, spoil=broken_off), checkpoint_minutes=EACH_STEP)
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    before = load_checkpoint(tmp_path / "run").state["part"]["seconds"]
    record = goes_on(tmp_path / "run").run_epoch()
    assert record["seconds"] > before > 0
    assert record["total_seconds"] == record["seconds"]


@pytest.mark.parametrize("change", [{"losses": torch.zeros(6)}, {"shapes": torch.zeros(0, 4)}, {"seconds": None}])
def test_a_part_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, monkeypatch, change):
    run = make_run(tmp_path / "run", model=spoilt(4, spoil=broken_off), checkpoint_minutes=EACH_STEP)
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    checkpoint = load_checkpoint(tmp_path / "run")
    checkpoint.state["part"].update(change)
    if change == {"seconds": None}:
        del checkpoint.state["part"]["seconds"]
    monkeypatch.setattr("lowcal.training.train_state.load_checkpoint", lambda folder: checkpoint)
    run = make_run(tmp_path / "run")
    before = state(run)
    with pytest.raises(LowcalError, match="does not fit this run"):
        run.resume()
    assert same(state(run), before)


def test_a_saving_that_a_crash_left_undone_is_ended(tmp_path, whole):
    run = run_on(make_run(tmp_path / "run"))
    (run.folder.path / "checkpoint.pt").rename(run.folder.path / "checkpoint.next.pt")
    run = goes_on(tmp_path / "run")
    assert run.done
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "checkpoint.next.pt").exists()
    assert same(state(run), whole["local"][0])


# Signals


@pytest.mark.parametrize(
    ("number", "place", "at"),
    [
        (signal.SIGUSR1, {"training": True}, (0, 1)),
        (signal.SIGTERM, {"training": True}, (2, 3)),
        (signal.SIGINT, {"training": True}, (2, 5)),
        (signal.SIGTERM, {"training": False}, (2, 1)),
        (signal.SIGTERM, {"training": False}, (0, 2)),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step(tmp_path, whole, number, place, at):
    """`at` is the epoch, and the step or the batch of evaluation, in which the signal comes."""
    epoch, step = at
    passes = epoch * (5 if place["training"] else 2) + step
    run = make_run(tmp_path / "run", model=spoilt(passes, spoil=sends(number), **place))
    with catch_signals(), pytest.raises(Interrupted) as error:
        run_on(run)
    assert error.value.signal == number
    run = goes_on(tmp_path / "run")
    after_epoch = place == {"training": False} and step == 2  # the last batch: nothing comes after it
    assert (run.finished, run.finished_steps) == (
        (epoch + 1, 0) if after_epoch else (epoch, step if place["training"] else 5)
    )
    run_on(run)
    assert same((state(run), untimed(run.finish())), whole["local"])


@pytest.mark.parametrize("method", ["local", "prune"])
def test_a_signal_at_a_move_waits_until_it_is_saved(tmp_path, whole, method, monkeypatch):
    run = run_on(make_run(tmp_path / "run", method), 2)
    end_epoch = run.method.end_epoch

    def interrupted_end(loss):
        signal.raise_signal(signal.SIGTERM)
        return end_epoch(loss)

    monkeypatch.setattr(run.method, "end_epoch", interrupted_end)
    with catch_signals(), pytest.raises(Interrupted):
        run_on(run)
    run = goes_on(tmp_path / "run", method)
    assert (run.finished, run.finished_steps) == (3, 0)
    assert same(state(run_on(run)), whole[method][0])


def test_a_signal_while_images_are_loaded_saves_too(tmp_path, whole, monkeypatch):
    """One to the whole process group ends the loader's workers as well."""
    run = make_run(tmp_path / "run")
    raw_batches = run.train.raw_batches

    def fail():
        for given in raw_batches():
            if len(run.folder.read_epochs()) == 1 and run.train._position > 10:
                signal.raise_signal(signal.SIGTERM)
                raise LowcalError("a worker was killed")
            yield given

    monkeypatch.setattr(run.train, "raw_batches", fail)
    monkeypatch.setattr(run.train, "state_dict", lambda: {**type(run.train).state_dict(run.train), "position": 10})
    with catch_signals(), pytest.raises(Interrupted):
        run_on(run)
    run = goes_on(tmp_path / "run")
    assert (run.finished, run.finished_steps) == (1, 2)
    assert same(state(run_on(run)), whole["local"][0])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(scores):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run = run_on(make_run(tmp_path / "run", model=spoilt(7, spoil=twice)), 1)
    with catch_signals(), pytest.raises(Interrupted):
        run.run_epoch()
    run = goes_on(tmp_path / "run")
    assert (run.finished, run.finished_steps) == (1, 0)


def test_a_second_sigterm_waits_with_the_first(tmp_path):
    with catch_signals(), deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert requested()
    assert not requested()


def test_outside_training_a_signal_acts_at_once_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with pytest.raises(Interrupted) as error, catch_signals():
            signal.raise_signal(number)
        assert error.value.signal == number
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
