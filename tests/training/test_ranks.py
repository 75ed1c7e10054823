"""Several processes that train one network: alike to the bit, and like one process on the whole mini-batch."""

import pytest
import torch
from torch import nn

from lowcal.methods import METHODS

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
