"""What the tests of training share."""

import pytest
import torch

import lowcal.training.cost as cost
from lowcal.methods import METHODS

from .runs import make_run, run_on, state, untimed

_costs = {}


@pytest.fixture(autouse=True)
def _remembered_costs(monkeypatch):
    """A dry run takes longer than training these networks does; the same one is made once."""
    dry_cost = cost.dry_cost

    def remember(method, shape, *, precision):
        weights = [(name, value.shape) for name, value in method.model.named_parameters()]
        key = (str(method.model), method.name, method.boundary, str(method.settings), str(weights), shape, precision)
        if key not in _costs:
            _costs[key] = dry_cost(method, shape, precision=precision)
        return _costs[key]

    monkeypatch.setattr(cost, "dry_cost", remember)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """For each method the state of a run that was never interrupted, and its summary."""
    found = {}
    for name in METHODS:
        torch.manual_seed(0)
        run = run_on(make_run(tmp_path_factory.mktemp(name) / "run", name))
        found[name] = state(run), untimed(run.finish())
    return found
