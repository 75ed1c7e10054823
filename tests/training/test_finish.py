"""The weights that a finished run leaves."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from lowcal.training.checkpoint import export_weights

from ..networks import convnet
from ..support import same, weights
from .runs import make_run, run_on


@pytest.mark.parametrize("method", ["local", "prune"])
def test_a_finished_run_leaves_its_weights_twice(tmp_path, method):
    run = run_on(make_run(tmp_path / "run", method, epochs=4))
    run.finish()
    plain = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert same(dict(plain), weights(run.model))
    assert same(load_file(tmp_path / "run" / "model.safetensors"), weights(run.model))


def test_what_shares_memory_or_lies_otherwise_is_written_out(tmp_path):
    model = convnet().to(memory_format=torch.channels_last)
    model.second = model.head
    export_weights(model, tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), weights(model))
    fresh = convnet()
    fresh.second = fresh.head
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert same(weights(fresh), weights(model))


def test_without_the_library_the_plain_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    export_weights(convnet(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
