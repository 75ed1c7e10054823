"""What the tests of experiments share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _undrawn(undrawn):
    pass


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the trial builds of the network, which take half the time of a short sweep."""
    for module in ("sweep", "sweep_worker"):
        monkeypatch.setattr(f"lowcal.experiments.{module}.check", lambda *arguments: None)
