import os

import pytest
import torch

from lowcal import LowcalError
from lowcal.experiments.determinism import deterministic


def flags():
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_it_holds_within_and_not_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic(True):
        assert flags() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before
    with deterministic(False):
        assert flags() == before


def test_what_has_no_such_algorithm_is_named():
    """`put_` has none on the CPU either."""
    with (
        pytest.raises(LowcalError, match=r"^put_ does not have a deterministic implementation; use"),
        deterministic(True),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert flags()[0] is False


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another")
