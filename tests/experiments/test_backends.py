import os
from dataclasses import replace

import pytest
import torch

from lowcal import LowcalError
from lowcal.experiments.backends import kernels, kernels_of
from lowcal.experiments.recipe_text import load_recipe


def flags():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.allow_tf32,
        matmul.allow_tf32,
    )


def test_deterministic_ones_hold_within_and_not_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with kernels(deterministic=True):
        assert flags() == (True, True, False, *before[3:])
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before


def test_the_fastest_are_the_default():
    before = flags()
    with kernels():
        assert flags() == (False, False, True, *before[3:])
    assert flags() == before


@pytest.mark.parametrize("asked", [True, False])
def test_tf32_where_asked(asked):
    before = flags()
    with kernels_of(replace(load_recipe("digits"), tf32=asked)):
        assert flags()[3:] == (asked, asked)
    assert flags() == before


def test_what_has_no_deterministic_algorithm_is_named():
    """`put_` has none on the CPU either."""
    with (
        pytest.raises(LowcalError, match=r"^put_ does not have a deterministic implementation; use"),
        kernels(deterministic=True),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert flags()[0] is False


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="another"), kernels(deterministic=True):
        raise RuntimeError("another")
