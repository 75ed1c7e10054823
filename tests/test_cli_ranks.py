"""The command in two processes: one speaks, one writes, and a mistake ends both with one line."""

import json
import os
import sys

import pytest

from lowcal.cli import main

from .world import apart

SMALL = [
    f"--set={setting}"
    for setting in (
        "data={name: synthetic, train_images: 20, test_images: 10, image_size: 8, classes: 3}",
        "epochs=2",
        "batch=8",
        "model.width=4",
    )
]


def answer(place, arguments, variables):
    """Runs the command; what it prints goes to files that the processes share."""
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        with (place / name).open("a") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    return main([str(argument) for argument in arguments])


def in_two(place, *arguments, **variables):
    """The exit codes, the lines of standard output and those of standard error.

    The first process keeps what all agree by, which is torchrun's part, and that it has ended torch says at length.
    """
    codes = apart(2, answer, place, arguments, variables)
    errors = (place / "err").read_text()
    assert "Traceback" not in errors
    ours = [line for line in errors.splitlines() if line.startswith("lowcal:") or "TCPStore" not in errors]
    out = [line for line in (place / "out").read_text().splitlines() if not line.startswith("[Gloo]")]  # torch 2.10
    return codes, out, ours


def test_two_processes_make_one_run_which_one_tells_of(tmp_path):
    arguments = ["train", "--device", "cpu", "--log", "csv,tensorboard", "--out", tmp_path / "run", *SMALL]
    codes, out, err = in_two(tmp_path, *arguments)
    assert (codes, err) == ([0, 0], [])
    assert "local by 2 processes" in out[0]
    assert [line.split()[1] for line in out[1:3]] == ["1/2", "2/2"]
    assert out[-1] == f"run: {tmp_path / 'run'}"
    assert len(out) == 5
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
    assert len((tmp_path / "run" / "epochs.jsonl").read_text().splitlines()) == 2
    logs = tmp_path / "run" / "logs"
    assert len(list(logs.rglob("events.*"))) == 1
    (scalars,) = logs.rglob("scalars.csv")
    assert [line.split(",")[0] for line in scalars.read_text().splitlines()] == ["epoch", "1", "2"]


def test_two_processes_train_a_network_and_images_of_a_file(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nfrom lowcal.models import build_model\n"
        "torch.rand(1)\n"
        "def build(classes, channels): return build_model('resnet8', classes=classes, in_channels=channels, width=4)\n"
        "def load():\n"
        "    pixels = torch.arange(20 * 192).view(20, 3, 8, 8).mul(37).remainder(256).to(torch.uint8)\n"
        "    return (pixels, torch.arange(20) % 3), (pixels[:9], torch.arange(9) % 3)\n"
    )
    settings = [f"--set={setting}" for setting in (f"model.name={own}:build", f"data.name={own}:load", "batch=8")]
    arguments = ["train", "--device", "cpu", "--set", "epochs=1", *settings, "--out", tmp_path / "run"]
    codes, out, err = in_two(tmp_path, *arguments)
    assert (codes, err) == ([0, 0], [])
    assert "own.py:load" in out[0]
    assert len((tmp_path / "run" / "epochs.jsonl").read_text().splitlines()) == 1


COMMON = ["train", "--out", "{}/run", *SMALL]
MISTAKES = {
    "is not a folder; choose another --out": ["train", "--out", "{}/file", *SMALL],
    "the training loss became": [*COMMON, "--set", "optimizer.lr=1e30"],
}
MORE = {
    "is not a folder; give the folder of a run": ["train", "--out", "{}/run", "--resume"],
    "batch.size=1: is shared among 2 processes": [*COMMON, "--set", "batch=1"],
    "step=compiled: is for one process": [*COMMON, "--set", "step=compiled"],
    "cache=disk: is for one process": [*COMMON, "--set", "cache=disk"],
    "2 processes on this machine, where torch finds 0": [*COMMON, "--device", "cuda"],
    "device 'cuda:1' is one for several processes": [*COMMON, "--device", "cuda:1"],
    "unknown setting 'epochz'": [*COMMON, "--set", "epochz=1"],
    "lowcal compare is for one process": ["compare", "--out", "{}/run", *SMALL],
}


@pytest.mark.parametrize("said", [*MISTAKES, *(pytest.param(said, marks=pytest.mark.slow) for said in MORE)])
def test_a_mistake_ends_both_with_one_line(tmp_path, said):
    arguments = {**MISTAKES, **MORE}[said]
    (tmp_path / "file").touch()
    codes, _, err = in_two(
        tmp_path,
        *(argument.format(tmp_path) if "{}" in argument else argument for argument in arguments),
        CUDA_VISIBLE_DEVICES="",
    )
    assert codes == [2, 2]
    assert len(err) == 1, err
    assert said in err[0]


def test_where_torchrun_may_restart_the_run_its_folder_must_be_given(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *SMALL]) == 2
    assert capsys.readouterr().err == "lowcal: torchrun --max-restarts needs the run's folder: give it with --out\n"


def test_after_a_restart_a_run_goes_on_without_being_told(tmp_path):
    command = ["train", "--device", "cpu", "--out", tmp_path / "run", *SMALL]
    assert in_two(tmp_path, *command, TORCHELASTIC_RESTART_COUNT="1")[0] == [0, 0]
    (tmp_path / "run" / "summary.json").unlink()
    codes, out, _ = in_two(tmp_path, *command, TORCHELASTIC_RESTART_COUNT="1")
    assert codes == [0, 0]
    assert any("goes on after epoch 2 of 2" in line for line in out)
