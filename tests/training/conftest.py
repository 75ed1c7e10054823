"""What the tests of training share."""

import pytest

import lowcal.training.cost as cost

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
