"""A batch that grows when a move frees memory: the decision, the runs, and memory that runs out."""

from contextlib import contextmanager

import pytest
import torch

from lowcal.method_settings import LocalSettings, ScheduleSettings
from lowcal.methods import build_method
from lowcal.steps.step import is_out_of_memory
from lowcal.training.batch_growth import BatchGrowth, next_batch, predicted_peak
from lowcal.training.cost import dry_cost, held_bytes

from ..support import same
from .runs import make_run, network, run_on, spoilt, state

AMPLE = 10**9  # bytes
EACH_STEP = 1e-9  # minutes
GROWN = [5, 5, 10, 10, 20, 20]  # what MOVES (after the first and the third epoch) make of 5 where memory is ample


def growing(batch=5, most=22, limit=AMPLE, **options):
    return BatchGrowth(batch, most=most, limit=limit, **options)


def grows(path, method="local", growth=None, **options):
    return make_run(path, method, growth=growth or growing(), **options)


def untold(run):
    """The state of a run, but for what its log says of the batch that did not fit."""
    found = state(run)
    return {**found, "log": [{k: v for k, v in record.items() if k != "refused_batch"} for record in found["log"]]}


def raises(error):
    def spoil(scores):
        raise error

    return spoil


# The decision


@pytest.mark.parametrize(
    ("peak", "held", "limit", "most", "expected"),
    [
        (60, 20, 100, 128, 128),  # 20 + 2 * 40 = 100: just fits
        (60, 20, 99, 128, 64),
        (60, 20, 100, 127, 64),
        (50, 0, 100, 128, 128),  # the paper's half
        (51, 0, 100, 128, 64),
    ],
)
def test_the_batch_doubles_if_and_only_if_it_fits(peak, held, limit, most, expected):
    assert next_batch(64, peak=peak, held=held, limit=limit, most=most) == expected


@pytest.mark.parametrize("boundary", [0, 1, 4, 6])
@pytest.mark.parametrize("method", ["local", "freeze"])
def test_a_doubled_batch_takes_what_is_predicted_or_little_less(method, boundary):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = LocalSettings(schedule=ScheduleSettings(name="fixed", epochs={}))
    attached = build_method(method, model, optimizer, plan, epochs=2, example_inputs=torch.zeros(1, 2, 6, 6), seed=0)
    attached.move_to(boundary)
    model(torch.randn(16, 2, 6, 6)).sum().backward()
    optimizer.step()
    peak, doubled = (dry_cost(attached, (count, 2, 6, 6)).peak_bytes for count in (16, 32))
    predicted = predicted_peak(peak, held_bytes(model, optimizer, gradients=False))
    assert doubled <= predicted <= 1.1 * doubled


def path(growth, peaks, moves, held=0):
    """The batch of each epoch, the first included."""
    batches = [growth.batch]
    for epoch, peak in enumerate(peaks):
        growth.end_epoch(peak, held, moved=epoch in moves)
        batches.append(growth.batch)
    return batches


def test_it_grows_after_the_epoch_that_followed_a_move_and_once_for_each():
    assert path(growing(64, 10**6), [50, 50, 50, 50], moves={}) == [64] * 5
    assert path(growing(64, 10**6), [50, 50, 50, 50], moves={0}) == [64, 64, 128, 128, 128]
    assert path(growing(64, 10**6), [50] * 6, moves={0, 3}) == [64, 64, 128, 128, 128, 256, 256]
    assert path(growing(64, 10**6), [50] * 4, moves={0, 1}) == [64, 64, 128, 256, 256]


def test_moves_that_free_too_little_add_up():
    peaks, moves = [100, 80, 60, 50, 90], {0, 1, 2}
    assert path(growing(64, 10**6, limit=100), peaks, moves) == [64, 64, 64, 64, 128, 128]


def test_without_a_limit_it_is_what_the_first_epoch_needed():
    growth = growing(64, 10**6, limit=None)
    assert path(growth, [100, 60, 51, 50], moves={0, 1, 2}) == [64, 64, 64, 64, 128]
    assert path(growing(64, 10**6, limit=None), [100, 60], moves={0}, held=20) == [64, 64, 128]


def test_it_is_never_larger_than_the_data():
    assert path(growing(5, 22), [1] * 9, moves=set(range(9)))[-4:] == [20] * 4
    assert path(growing(5, 19), [1] * 9, moves=set(range(9)))[-1] == 10


def test_what_did_not_fit_is_not_tried_again():
    growth = growing(64, 10**6)
    path(growth, [50, 50], moves={0})
    assert (growth.batch, growth.on_trial, growth.proven) == (128, True, 64)
    growth.refuse()
    assert (growth.batch, growth.on_trial, growth.refused) == (64, False, 128)
    assert path(growth, [1] * 5, moves=set(range(5))) == [64] * 6


def test_the_learning_rate_grows_with_the_batch_if_asked():
    for scale, factors in ((False, [1, 1, 1]), (True, [1, 1, 2])):
        growth, found = growing(64, 10**6, scale_lr=scale), []
        for _ in factors:
            found.append(growth.lr_factor)
            growth.end_epoch(50, 0, moved=True)
        assert found == factors


def test_a_decision_is_taken_up_where_it_was_saved():
    one, saved = growing(64, 10**6, limit=None), growing(64, 10**6, limit=None)
    for peak, moved in [(100, True), (70, False), (50, True), (45, False), (40, True)]:
        one.end_epoch(peak, 0, moved=moved)
        other = growing(64, 10**6, limit=None)
        other.load_state_dict(saved.state_dict())
        other.end_epoch(peak, 0, moved=moved)
        assert other.state_dict() == one.state_dict()
        saved = other
    assert one.batch == 256


# Runs


def test_a_run_grows_its_batch_and_says_so(tmp_path):
    run = grows(tmp_path / "run")
    news = []
    while not run.done:
        run.run_epoch()
        news.append(run.news)
    records = run.folder.read_epochs()
    assert [record["batch"] for record in records] == GROWN
    assert [record["steps"] for record in records] == [5, 5, 3, 3, 2, 2]
    assert [record["lr"] for record in records] == [0.1 * 0.7**epoch for epoch in range(6)]
    assert {record["refused_batch"] for record in records} == {None}
    assert news == [(), ("batch 10 from epoch 3 on",), (), ("batch 20 from epoch 5 on",), (), ()]
    assert records[2]["peak_memory_bytes"] > records[1]["peak_memory_bytes"]


def test_it_is_bitwise_the_run_whose_batch_is_set_by_hand(tmp_path):
    grown = run_on(grows(tmp_path / "one", growth=growing(scale_lr=True)))
    by_hand = make_run(tmp_path / "two", lr_at=lambda epoch: 0.1 * 0.7**epoch * GROWN[epoch] / 5)
    for batch in GROWN:
        by_hand.train.batch = batch
        by_hand.run_epoch()
    assert same(state(grown), state(by_hand))


def test_without_a_limit_the_memory_stays_within_the_first_epochs(tmp_path):
    run = grows(tmp_path / "run", growth=growing(limit=None), local=halving())
    run_on(run)
    records = run.folder.read_epochs()
    assert [record["batch"] for record in records] == [5, 5, 10, 10, 10, 10]
    peaks = [record["peak_memory_bytes"] for record in records]
    assert max(peaks) == peaks[0] > peaks[2] > peaks[1]


def halving():
    """Six of the seven layers local after the first epoch."""
    return LocalSettings(lr=0.05, schedule=ScheduleSettings(name="fixed", epochs={1: 6}))


def broken_off(scores):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "steps"),
    [("prune", 5 + 5 + 2), ("local", 5 + 5), ("local", 5 + 5 + 2), ("local", 5 + 5 + 3 + 1)],
)
def test_a_growing_run_killed_anywhere_is_bitwise_the_uninterrupted_one(tmp_path, method, steps):
    one = run_on(grows(tmp_path / "one", method, growth=growing(scale_lr=True)))
    model = spoilt(steps + 1, spoil=broken_off)
    run = grows(tmp_path / "two", method, growth=growing(scale_lr=True), model=model, checkpoint_minutes=EACH_STEP)
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    torch.manual_seed(99)
    two = grows(tmp_path / "two", method, growth=growing(scale_lr=True))
    assert two.resume() == ()
    two.warm_up()
    assert same(state(one), state(run_on(two)))


# Memory that runs out


def test_what_torch_raises_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("FIND was unable to find an engine to execute this computation"))
    assert not is_out_of_memory(RuntimeError("shape '[3]' is invalid"))
    with pytest.raises(RuntimeError) as broken, broken_capture():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(broken.value)


@contextmanager
def broken_capture():
    """Ends as `torch.cuda.graph` does when what it captures fails."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.gpu
def test_what_a_gpu_raises_is_known():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)


SPOIL = [raises(torch.OutOfMemoryError("CUDA out of memory")), lambda scores: torch.empty(2**60, dtype=torch.uint8)]


@pytest.mark.parametrize(("method", "spoil"), [("local", SPOIL[0]), ("prune", SPOIL[1])], ids=["device", "processor"])
def test_out_of_memory_leaves_the_run_as_if_the_batch_had_not_grown(tmp_path, method, spoil):
    plain = run_on(make_run(tmp_path / "one", method))
    before = 3 if method == "prune" else 2  # epochs, the last of which followed the first move
    run = grows(tmp_path / "two", method, model=spoilt(before * 5 + 2, spoil=spoil))
    news = []
    while not run.done:
        run.run_epoch()
        news += run.news
    assert same(untold(run), untold(plain))
    refused = [record["refused_batch"] for record in run.folder.read_epochs()]
    assert refused == [None] * before + [10] * (6 - before)
    told = f"out of memory with batch 10: epoch {before + 1} began again with batch 5, which stays"
    assert news == [f"batch 10 from epoch {before + 1} on", told]


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"max_skips": 2, "fused": True}])
def test_it_is_so_in_other_settings(tmp_path, options):
    plain = run_on(make_run(tmp_path / "one", **options))
    run = run_on(grows(tmp_path / "two", model=spoilt(5 + 5 + 2, spoil=SPOIL[0]), **options))
    assert same(untold(run), untold(plain))


def test_only_what_is_on_trial_is_given_up(tmp_path):
    run = grows(tmp_path / "one", model=spoilt(5 + 1, spoil=SPOIL[0]))
    with pytest.raises(torch.OutOfMemoryError):
        run_on(run)
    run = grows(tmp_path / "two", model=spoilt(5 + 5 + 3 + 1, spoil=SPOIL[0]))  # the second epoch of ten
    with pytest.raises(torch.OutOfMemoryError):
        run_on(run)
    run = grows(tmp_path / "three", model=spoilt(5 + 5 + 1, spoil=raises(RuntimeError("another"))))
    with pytest.raises(RuntimeError, match="another"):
        run_on(run)


def test_memory_that_runs_out_after_a_resumption_within_the_trial_is_the_same(tmp_path):
    plain = run_on(make_run(tmp_path / "one"))
    model = spoilt(5 + 5 + 3, spoil=broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_on(grows(tmp_path / "two", model=model, checkpoint_minutes=EACH_STEP))
    run = grows(tmp_path / "two", model=spoilt(1, spoil=SPOIL[0]))
    run.resume()
    assert (run.finished, run.finished_steps, run.train.batch) == (2, 2, 10)
    assert same(untold(run_on(run)), untold(plain))


def test_a_batch_that_was_refused_is_not_tried_after_a_resumption(tmp_path):
    plain = run_on(make_run(tmp_path / "one"))
    passes = 5 + 5 + 1
    model = spoilt(passes, passes + 1, spoil=lambda scores: spoils.pop(0)(scores))
    spoils = [SPOIL[0], broken_off]
    run = grows(tmp_path / "two", model=model)
    with pytest.raises(KeyboardInterrupt):
        run_on(run)
    run = grows(tmp_path / "two")
    run.resume()
    assert (run.finished, run.finished_steps, run.train.batch) == (2, 0, 5)
    assert same(untold(run_on(run)), untold(plain))
    assert run.folder.read_epochs()[-1]["refused_batch"] == 10


def test_warming_up_takes_no_more_images_than_are_known_to_fit(tmp_path):
    run = run_on(grows(tmp_path / "run"), 2)
    assert run.train.batch == 10
    sizes = []
    run.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))  # of copies too
    run.warm_up()
    assert max(sizes) == 5
