"""What the tests of training share."""

import pytest
import torch

from lowcal.methods import METHODS

from .runs import make_run, run_on, state, untimed


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """For each method the state of a run that was never interrupted, and its summary."""
    found = {}
    for name in METHODS:
        torch.manual_seed(0)
        run = run_on(make_run(tmp_path_factory.mktemp(name) / "run", name))
        found[name] = state(run), untimed(run.finish())
    return found
