"""Ways on from a run that diverged or is finished, as the command offers them."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from lowcal.cli import main
from lowcal.training import epoch as epoch_module
from lowcal.training.run_folder import RunFolder

SMALL = [
    "batch=16",
    "model.width=8",
    "step=eager",
    "data={name: synthetic, train_images: 32, test_images: 16, image_size: 8, classes: 4}",
]
TIMES = {"seconds", "total_seconds", "step_ms", "images_per_second"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*arguments: str, settings: tuple[str, ...] = ()) -> int:
    options = [part for setting in settings for part in ("--set", setting)]
    return main(["train", "--device", "cpu", *arguments, *options])


def start(folder: str, *settings: str) -> int:
    return train("--quiet", "--method", "local", "--out", folder, settings=(*SMALL, *settings))


def refused(capsys, *words: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("lowcal: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def log(folder: str) -> list[dict]:
    records = [json.loads(line) for line in (Path(folder) / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder) / "model.pt", weights_only=True)


def diverge(monkeypatch, folder: str, epoch: int, *settings: str) -> int:
    """Starts a run of four epochs whose test loss is no number after `epoch`, counted from 1."""
    calls = []

    def evaluate(*args, **kwargs):
        calls.append(1)
        return (float("nan"), 0.0) if len(calls) == epoch else whole(*args, **kwargs)

    whole = epoch_module.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(epoch_module, "evaluate", evaluate)
        return start(folder, "epochs=4", *settings)


ALIKE = ("lr_schedule.name=constant", "local.schedule={name: fixed, epochs: {1: 3}}")


def test_an_extended_run_is_the_longer_one_where_nothing_depends_on_its_length(capsys):
    assert start("long", "epochs=4", *ALIKE) == 0
    assert start("short", "epochs=2", *ALIKE) == 0
    assert train("--quiet", "--resume", "--extend", "--out", "short", settings=("epochs=4",)) == 0
    assert log("short") == log("long")
    assert all(torch.equal(value, weights("long")[name]) for name, value in weights("short").items())
    summary, other = (json.loads((Path(name) / "summary.json").read_text()) for name in ("short", "long"))
    assert (summary["epochs"], summary["flops"]) == (4, other["flops"])
    assert RunFolder(Path("short")).recipe == RunFolder(Path("long")).recipe
    capsys.readouterr()
    assert train("--resume", "--out", "short") == 0
    assert "short is finished already; --resume --extend --set epochs=N" in capsys.readouterr().out


def test_what_an_extension_does_to_the_schedules_is_said(capsys):
    assert start("run", "epochs=4", "lr_schedule.name=cosine", "optimizer.lr=0.08", "local.schedule.shift=3") == 0
    assert train("--resume", "--extend", "--out", "run", settings=("epochs=8",)) == 0
    said = capsys.readouterr().out
    # Eq. 2 of ten layers: 4 / (0.75 * 10 / 3) = 1.6, and 3.2; half-way a cosine has half of its rate.
    line = "epochs (4 before, 8 now); K, epochs between moves, from 2 to 3; learning rate of epoch 5 from 0 to 0.04"
    assert f"local-seed0: {line}\n" in said
    assert [record["epoch"] for record in log("run")] == list(range(8))
    assert log("run")[4]["lr"] == pytest.approx(0.04)


def test_what_is_no_extension_is_refused(capsys):
    assert start("run", "epochs=2") == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    resume = ("--resume", "--out", "run")
    for arguments, settings, words in (
        ((*resume,), ("epochs=3",), ("epochs (2 there, 3 here)", "--resume --extend --set epochs=N")),
        ((*resume, "--extend"), (), ("has 2 epochs", "--set epochs=4")),
        ((*resume, "--extend"), ("epochs=1",), ("has 2 epochs",)),
        ((*resume, "--extend"), ("epochs=3", "local.lr=0.5"), ("local.lr (",)),
        ((*resume, "--extend"), ("epochs=3", "optimizer.lr=0.5"), ("optimizer.lr (",)),
        (("--extend", "--out", "run"), ("epochs=3",), ("--resume too",)),
        (("--out", "run"), ("epochs=3",), ("it is finished: --resume --extend", "choose another --out")),
    ):
        capsys.readouterr()
        assert train(*arguments, settings=settings) == 2
        refused(capsys, *words)
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.parametrize("crash", ["environment.json", "recipe.yaml"])
def test_an_extension_that_a_crash_breaks_off_can_be_made_again(crash, monkeypatch, capsys):
    assert start("long", "epochs=3", *ALIKE) == 0
    assert start("run", "epochs=2", *ALIKE) == 0
    replace = Path.replace

    def replaced(path, target):
        if target.name == crash:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    extend = ("--quiet", "--resume", "--extend", "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        assert train(*extend, settings=("epochs=3",)) == 2
    assert train("--quiet", "--resume", "--out", "run") == 0  # with the old recipe
    assert train(*extend, settings=("epochs=3",)) == 0
    assert log("run") == log("long")


def test_a_run_that_diverged_before_its_first_epoch_ended_is_replaced(monkeypatch, capsys):
    assert diverge(monkeypatch, "run", 1) == 2
    refused(capsys, "at step 2 of epoch 1 of 4", "starts again in this folder")
    assert start("run", "epochs=2", "optimizer.lr=0.01") == 0
    assert start("other", "epochs=2", "optimizer.lr=0.01") == 0
    assert log("run") == log("other")
    assert {path.name for path in Path("run").iterdir()} == {path.name for path in Path("other").iterdir()}


def test_a_run_that_diverged_later_goes_on_with_a_lower_rate(monkeypatch, capsys):
    assert diverge(monkeypatch, "run", 3, "optimizer.lr=0.1", *ALIKE) == 2
    way = "--resume --out run --set optimizer.lr=0.01, say, goes on from its last checkpoint"
    refused(capsys, "of epoch 3 of 4", "the last checkpoint is that of epoch 2", way)
    kept = log("run")
    assert start("run", "epochs=4") == 2
    refused(capsys, "holds a run already", way)
    assert train("--resume", "--out", "run", settings=("model.width=4",)) == 2
    refused(capsys, "model.width (")
    capsys.readouterr()
    assert train("--resume", "--out", "run", settings=("optimizer.lr=0.01",)) == 0
    assert "optimizer.lr (0.1 before, 0.01 now); learning rate of epoch 3 from 0.1 to 0.01" in capsys.readouterr().out
    assert log("run")[:2] == kept
    assert [record["lr"] for record in log("run")] == [0.1, 0.1, 0.01, 0.01]
    assert train("--resume", "--out", "run", settings=("optimizer.lr=0.001",)) == 2  # it has not diverged since
    refused(capsys, "optimizer.lr (0.01 there, 0.001 here)")


def test_a_comparison_that_diverged_in_its_first_epoch_is_taken_over(capsys):
    options = [part for setting in (*SMALL, "epochs=1") for part in ("--set", setting)]
    compare = ["compare", "--quiet", "--device", "cpu", "--methods", "sgd", *options, "--out", "out"]
    assert main([*compare, "--set", "optimizer.lr=1e30"]) == 2
    assert main(compare) == 0
    assert len(log("out/sgd-seed0")) == 1


def test_a_run_without_an_epoch_is_kept_while_it_is_at_work_or_has_a_checkpoint(tmp_path):
    identity = {"method": "sgd", "recipe": "r", "seed": 0, "epochs": 1, "model": "m", "dataset": "d", "label": None}
    path = tmp_path / "run"
    at_work = RunFolder.create(path, recipe="name: r\n", environment={}, identity=identity)
    assert RunFolder(path).may_be_replaced()
    at_work.occupy()
    assert not RunFolder(path).may_be_replaced()
    child = os.fork()
    if not child:
        os._exit(int(RunFolder(path).may_be_replaced()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    at_work.note_divergence("it diverged")
    assert RunFolder(path).may_be_replaced()
    (path / "diverged.json").unlink()
    (path / "checkpoint.pt").touch()
    assert not RunFolder(path).may_be_replaced()
    RunFolder(path).note_divergence("it diverged")
    assert RunFolder(path).may_be_replaced()
    (path / "step.json").touch()
    RunFolder(path).clear()
    assert list(path.iterdir()) == []


def test_divergence_is_forgotten_when_an_epoch_is_finished(monkeypatch):
    assert diverge(monkeypatch, "run", 2, "optimizer.lr=0.1") == 2
    assert re.fullmatch(r"the test loss is nan at step 2 of epoch 2 of 4", RunFolder(Path("run")).divergence())
    assert train("--quiet", "--resume", "--out", "run") == 0
    assert RunFolder(Path("run")).divergence() is None
