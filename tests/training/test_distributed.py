"""Several processes that train one network: alike to the bit, and like one process on the whole mini-batch."""

import os
import signal

import pytest
import torch
from torch import nn

from lowcal import LowcalError
from lowcal.data.mixing import Mixing
from lowcal.methods import METHODS
from lowcal.training.batch_growth import BatchGrowth
from lowcal.training.distributed import TrainingGroup, joined
from lowcal.training.process import LostError
from lowcal.training.signals import Interrupted, catch_signals

from ..support import same
from ..world import CPU, apart, together
from .runs import make_run, network, run_on, state

EACH_STEP = 1e-9  # minutes


def plain():
    """A network that draws nothing at random."""
    torch.manual_seed(0)
    model = network()
    model.drop = nn.Identity()
    return model


def watched(act):
    """The same, with `act` called with the number of images before each of its passes in training."""
    model = plain()

    def hook(model, inputs):
        if model.training and torch.is_grad_enabled() and not inputs[0].is_meta:
            act(len(inputs[0]))

    model.register_forward_pre_hook(hook)
    return model


def is_like(ours, theirs):
    """Whether one run's state is another's up to rounding."""
    assert ours["model"].keys() == theirs["model"].keys()
    assert ours["learning"] == theirs["learning"]
    assert same(ours["batches"], theirs["batches"])
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=1e-3, atol=1e-4)
    for our, their in zip(ours["log"], theirs["log"], strict=True):
        for name, value in their.items():
            if value is not None and name != "peak_memory_bytes":
                assert our[name] == (value if name == "step" else pytest.approx(value, rel=1e-3)), name


def keep(run, folder):
    torch.save(state(run), folder / f"state-{run.group.rank}.pt")


def kept(folder, world=2):
    """What `keep` kept in each process, which must be the same."""
    first, *others = (torch.load(folder / f"state-{rank}.pt") for rank in range(world))
    assert all(same(first, other) for other in others)
    return first


def train_all(group, folder, methods):
    for method in methods:
        run = run_on(make_run(folder / method, method, model=plain(), group=group))
        keep(run, folder / method)


# The batches are of 5 images, the last of 2: shares differ, and with three processes the last one's is empty.
@pytest.mark.parametrize(
    ("world", "methods"),
    [
        (2, ("prune",)),
        (3, ("local",)),
        pytest.param(2, tuple(METHODS), marks=pytest.mark.slow),
    ],
    ids=("two", "three", "all"),
)
def test_processes_are_alike_and_like_one(tmp_path, world, methods):
    runs = {method: make_run(tmp_path / "alone" / method, method, model=plain()) for method in methods}
    all_alone = {method: state(run_on(run)) for method, run in runs.items()}
    for method in methods:
        (tmp_path / method).mkdir()
    together(world, train_all, tmp_path, methods)
    for method, alone in all_alone.items():
        ours = kept(tmp_path / method, world)
        is_like(ours, alone)
        peaks = [[record["peak_memory_bytes"] for record in found["log"]] for found in (ours, alone)]
        assert all(ours < theirs for ours, theirs in zip(*peaks, strict=True))


def train_tuned(group, folder):
    """With a mean of the weights, mixed images and smoothed labels."""
    options = {"ema_decay": 0.8, "mixing": Mixing(3, 0.4, 1.0), "label_smoothing": 0.1, "warmup_epochs": 1.5}
    run = run_on(make_run(folder, model=plain(), group=group, **options))
    keep(run, folder)
    return {**state(run), "model": run.state.train.mean.state_dict()["tensors"]}


def test_so_are_the_mean_of_the_weights_and_mixed_images(tmp_path):
    (tmp_path / "two").mkdir()
    alone = train_tuned(TrainingGroup(), tmp_path / "alone")
    together(2, keep_tuned, tmp_path / "two")
    is_like(torch.load(tmp_path / "two/mean.pt"), alone)
    is_like(kept(tmp_path / "two"), kept(tmp_path / "alone", world=1))


def keep_tuned(group, folder):
    found = train_tuned(group, folder)
    if group.is_main:
        torch.save(found, folder / "mean.pt")


def half(group, folder):
    """Trains for two epochs and two steps of the third; then the last of the processes is told to end."""
    seen = 0

    def act(count):
        nonlocal seen
        seen += 1
        if seen == 12 and group.rank == group.world - 1:
            signal.raise_signal(signal.SIGTERM)

    run = make_run(folder, model=watched(act), group=group, checkpoint_minutes=EACH_STEP)
    with catch_signals(), pytest.raises(Interrupted):
        run_on(run)
    assert run.finished == 2
    group.barrier()


def the_rest(group, folder):
    run = make_run(folder, model=plain(), group=group)
    assert run.resume() == ("saved by 1 process(es), goes on with 2",)
    assert run.finished_steps > 0
    keep(run_on(run), folder)


def test_saved_by_two_and_gone_on_with_by_one_and_back(tmp_path):
    whole = state(run_on(make_run(tmp_path / "whole", model=plain())))
    together(2, half, tmp_path / "two")
    run = make_run(tmp_path / "two", model=plain())
    assert run.resume() == ("saved by 2 process(es), goes on with 1",)
    assert run.finished_steps > 0
    is_like(state(run_on(run)), whole)
    half(TrainingGroup(), tmp_path / "one")
    together(2, the_rest, tmp_path / "one")
    is_like(kept(tmp_path / "one"), whole)


def grow_and_skip(group, folder):
    steps = 0

    def spoil(model, inputs, scores):
        """The third step's scores, in the last process."""
        nonlocal steps
        steps += model.training and torch.is_grad_enabled() and not scores.is_meta
        return scores * torch.nan if steps == 3 and group.rank == group.world - 1 else None

    model = plain()
    model.register_forward_hook(spoil)
    growth = BatchGrowth(5, most=22, limit=10**9)
    run = run_on(make_run(folder, model=model, group=group, growth=growth, max_skips=1))
    keep(run, folder)


def test_the_batch_grows_and_a_bad_step_is_skipped_in_all_processes(tmp_path):
    for name in ("alone", "two"):
        (tmp_path / name).mkdir()
    grow_and_skip(TrainingGroup(), tmp_path / "alone")
    together(2, grow_and_skip, tmp_path / "two")
    is_like(kept(tmp_path / "two"), kept(tmp_path / "alone", 1))
    records = kept(tmp_path / "two")["log"]
    assert [record["batch"] for record in records] == [5, 5, 10, 10, 20, 20]
    assert [record["steps"] for record in records] == [5, 5, 3, 3, 2, 2]
    assert [record["skipped_steps"] for record in records] == [1, 0, 0, 0, 0, 0]


def train_growing(group, folder, growth, short_of_memory=()):
    """Trains; the processes `short_of_memory` have none for more than three images."""

    def allocate(model, inputs):
        if group.rank in short_of_memory and model.training and len(inputs[0]) > 3 and not inputs[0].is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = plain()
    model.register_forward_pre_hook(allocate)
    run = run_on(make_run(folder / "run", model=model, group=group, growth=growth, epochs=4))
    torch.save(state(run), folder / f"{group.rank}.pt")


def test_memory_that_one_process_lacks_keeps_the_batch_of_all(tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "grown").mkdir()
    together(2, train_growing, tmp_path / "fixed", BatchGrowth(5, most=5))
    together(2, train_growing, tmp_path / "grown", BatchGrowth(5, most=22, limit=10**9), (1,))
    fixed = torch.load(tmp_path / "fixed" / "0.pt")
    first, second = (torch.load(tmp_path / "grown" / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert [record.pop("refused_batch") for record in first["log"]] == [None, None, 10, 10]
    assert {record.pop("refused_batch") for record in fixed["log"]} == {None}
    assert same(first, fixed)


def fail_in_one(folder):
    """A mistake in one process: that one says so, the other is told that it is alone."""
    rank = int(os.environ["RANK"])

    def act(count):
        if rank == 1:
            raise LowcalError("a file cannot be read")

    with pytest.raises(LowcalError) as error, joined(CPU) as group:
        run_on(make_run(folder, model=watched(act), group=group))
    assert isinstance(error.value, LostError) == (rank == 0)
    return 10 + rank


def test_a_mistake_in_one_process_ends_all(tmp_path):
    assert apart(2, fail_in_one, tmp_path) == [10, 11]


def ask(group):
    assert group.from_main(lambda: {"rank": group.rank, "tensor": torch.ones(2)})["rank"] == 0
    with pytest.raises(LowcalError, match="no such folder"):
        group.from_main(refuse)
    assert group.max(group.rank) == group.world - 1
    assert [group.poll(value) for value in (0, 7 * group.rank, 0, 0)] == [0, 0, 7, 0]
    assert group.sum(torch.tensor(2.0)) == 2 * group.world
    torch.manual_seed(0)
    with group.own_random():
        own = torch.rand(())
    assert group.sum(own.clone()) != group.world * own  # others draw other numbers
    alike = torch.rand(())
    assert group.sum(alike.clone()) == group.world * alike  # and then the same again


def refuse():
    raise LowcalError("no such folder")


def test_what_processes_ask_of_each_other():
    together(2, ask)
    alone = TrainingGroup()
    assert (alone.from_main(lambda: 5), alone.max(3), alone.poll(7), alone.poll(0)) == (5, 3, 7, 0)


def interrupt_all(group, folder, methods, cut):
    for method in methods:
        whole = run_on(make_run(folder / method / "whole", method, group=group, epochs=5))
        run_on(make_run(folder / method / "cut", method, group=group, epochs=5), cut)
        group.barrier()  # for the main process's last checkpoint
        run = make_run(folder / method / "cut", method, group=group, epochs=5)
        assert run.resume() == ()
        assert same(state(run_on(run)), state(whole)), method


@pytest.mark.parametrize(
    "methods", [("local",), pytest.param(tuple(METHODS), marks=pytest.mark.slow)], ids=("one", "all")
)
def test_a_run_resumed_right_after_a_move_is_bitwise_the_uninterrupted_one(tmp_path, methods):
    together(2, interrupt_all, tmp_path, methods, 4)
