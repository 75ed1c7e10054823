"""The best weights: those of the first epoch with the lowest error, and the same however the run was interrupted."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lowcal.training.best import BestWeights, epoch_of
from lowcal.training.run_folder import RunFolder
from lowcal.training.train_state import RunState

from .runs import make_run, run_on

ERRORS = [60.0, 40.0, 50.0, 40.0, 30.0, 45.0]  # in these epochs; 4 is the best


@pytest.fixture
def seen(monkeypatch):
    """The weights that were evaluated, by epoch; the errors are as written above."""
    weights = {}

    def evaluate(model, batches, **options):
        epoch = current[0].finished
        weights[epoch] = {name: value.clone() for name, value in model.state_dict().items()}
        return 1.0, ERRORS[epoch]

    monkeypatch.setattr("lowcal.training.epoch.evaluate", evaluate)
    return weights


current = []


def same(one, other):
    """Whether two files have the same weights of the same epoch; the order of their metadata is not fixed."""
    weights, others = load_file(one), load_file(other)
    equal = all(torch.equal(value, others[name]) for name, value in weights.items())
    return epoch_of(one) == epoch_of(other) and weights.keys() == others.keys() and equal


def begun(path, method="local", **options):
    current[:] = [make_run(path, method, **options)]
    return current[0]


@pytest.mark.parametrize(("method", "options"), [("sgd", {}), ("local", {"ema_decay": 0.8}), ("prune", {})])
def test_they_are_those_that_were_evaluated_in_the_best_epoch_so_far(tmp_path, seen, method, options):
    run, file = begun(tmp_path / "run", method, **options), tmp_path / "run" / "model-best.safetensors"
    for best in (0, 1, 1, 1, 4, 4):
        run.run_epoch()
        found = load_file(file)
        assert found.keys() == seen[best].keys()
        assert all(torch.equal(value, seen[best][name]) for name, value in found.items())
        with safe_open(str(file), "pt") as opened:
            assert opened.metadata()["epoch"] == str(best)
    summary = run.finish()
    assert (summary["best_epoch"], summary["best_top1_error"]) == (4, 30.0)
    assert not (tmp_path / "run" / "model-best.next.safetensors").exists()


@pytest.mark.parametrize("epochs", [3, 4])  # before an epoch that is not the best so far, and before one that is
@pytest.mark.parametrize(("kind", "name"), [(RunFolder, "append"), (RunState, "save"), (BestWeights, "settle")])
def test_a_run_that_is_interrupted_around_its_checkpoint_has_the_same(tmp_path, seen, monkeypatch, epochs, kind, name):
    whole = run_on(begun(tmp_path / "whole"))
    run = run_on(begun(tmp_path / "run"), epochs)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.run_epoch()
    run = begun(tmp_path / "run")
    run.resume()
    file = tmp_path / "run" / "model-best.safetensors"
    assert epoch_of(file) == ERRORS.index(min(ERRORS[: run.finished]))
    run_on(run)
    assert same(file, whole.folder.path / file.name)


def test_an_epoch_that_is_taken_again_after_a_damaged_checkpoint(tmp_path, seen):
    whole = run_on(begun(tmp_path / "whole"))
    run_on(begun(tmp_path / "run"), 5)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    run, file = begun(tmp_path / "run"), tmp_path / "run" / "model-best.safetensors"
    run.resume()
    assert run.finished == 4
    assert not file.exists()  # it was of the epoch that is taken again
    run_on(run)
    assert same(file, whole.folder.path / file.name)
