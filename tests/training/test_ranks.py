"""Several processes that train one network: alike to the bit, and like one process on the whole mini-batch."""

import pytest
import torch
from torch import nn

from lowcal.methods import METHODS
from lowcal.training.growth import Growth

from ..support import same
from ..world import together
from .runs import make_run, network, run_on, state


def plain():
    """A network that draws nothing at random."""
    torch.manual_seed(0)
    model = network()
    model.drop = nn.Identity()
    return model


def train_all(ranks, folder, methods):
    for method in methods:
        run = run_on(make_run(folder / method, method, model=plain(), ranks=ranks))
        torch.save(state(run), folder / f"{method}-{ranks.rank}.pt")


# The batches are of 5 images, the last of 2: shares differ, and with three processes the last one's is empty.
@pytest.mark.parametrize(("world", "methods"), [(2, tuple(METHODS)), (3, ("sgd", "local"))], ids=("two", "three"))
def test_processes_are_alike_and_like_one(tmp_path, world, methods):
    runs = {method: make_run(tmp_path / "alone" / method, method, model=plain()) for method in methods}
    all_alone = {method: state(run_on(run)) for method, run in runs.items()}
    together(world, train_all, tmp_path, methods)
    for method, alone in all_alone.items():
        first, *others = (torch.load(tmp_path / f"{method}-{rank}.pt") for rank in range(world))
        for other in others:
            assert same(first, other), method
        assert first["model"].keys() == alone["model"].keys()
        assert first["learning"] == alone["learning"]
        assert same(first["batches"], alone["batches"])
        torch.testing.assert_close(first["model"], alone["model"], rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(first["log"], alone["log"], strict=True):
            for name, value in theirs.items():
                if value is None or name == "peak_memory_bytes":
                    continue
                assert ours[name] == pytest.approx(value, rel=1e-3), (method, name)
            assert ours["peak_memory_bytes"] < theirs["peak_memory_bytes"]


def train_growing(ranks, folder, growth, short_of_memory=()):
    """Trains; the processes `short_of_memory` have none for more than three images."""

    def allocate(model, inputs):
        if ranks.rank in short_of_memory and model.training and len(inputs[0]) > 3 and not inputs[0].is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = plain()
    model.register_forward_pre_hook(allocate)
    run = run_on(make_run(folder / "run", model=model, ranks=ranks, growth=growth))
    torch.save(state(run), folder / f"{ranks.rank}.pt")


def test_processes_grow_their_batch_together(tmp_path):
    alone = state(run_on(make_run(tmp_path / "alone", model=plain(), growth=Growth(5, most=22, limit=10**9))))
    together(2, train_growing, tmp_path, Growth(5, most=22, limit=10**9))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert [record["batch"] for record in first["log"]] == [5, 5, 10, 10, 20, 20]
    assert [record["steps"] for record in first["log"]] == [5, 5, 3, 3, 2, 2]
    torch.testing.assert_close(first["model"], alone["model"], rtol=1e-3, atol=1e-4)


def test_memory_that_one_process_lacks_keeps_the_batch_of_all(tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "grown").mkdir()
    together(2, train_growing, tmp_path / "fixed", Growth(5, most=5))
    together(2, train_growing, tmp_path / "grown", Growth(5, most=22, limit=10**9), (1,))
    fixed = torch.load(tmp_path / "fixed" / "0.pt")
    first, second = (torch.load(tmp_path / "grown" / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert [record.pop("refused_batch") for record in first["log"]] == [None, None, 10, 10, 10, 10]
    assert {record.pop("refused_batch") for record in fixed["log"]} == {None}
    assert same(first, fixed)
