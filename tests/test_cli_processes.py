"""The command interrupted, and as a process of its own."""

import shlex
import signal
import subprocess
import sys

import pytest

from lowcal.cli import main

from .commands import interrupted, into_a_closed_pipe, lines, refused, signalled, small

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize(("command", "epochs"), [("train", 0), ("compare", 3)])
def test_ctrl_c_tells_how_to_go_on_and_that_gives_the_same_run(here, command, epochs, monkeypatch, capsys):
    arguments = [command, *small("epochs=3"), *(["--methods", "sgd,local"] if command == "compare" else [])]
    assert main([*arguments, "--out", "whole", "--quiet"]) == 0
    capsys.readouterr()
    assert interrupted(arguments, epochs, monkeypatch) == 130
    error = capsys.readouterr().err
    assert error.startswith("lowcal: stopped; go on with: lowcal ")
    assert error.count("\n") == 1
    assert main(shlex.split(error.partition("go on with: lowcal ")[2])) == 0
    stopped = here / "runs" / ("digits" if command == "compare" else "digits-local")
    names = ["sgd-seed0", "local-seed0"] if command == "compare" else [""]
    for name in names:
        assert lines(stopped / name) == lines(here / "whole" / name)
        assert (stopped / name / "summary.json").is_file()


def test_a_signal_before_anything_is_written_says_so(here, monkeypatch, capsys):
    (here / "out").mkdir()
    monkeypatch.setattr("lowcal.experiments.train.load_data", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["train", *small(), "--out", "out", "--quiet"]) == 75
    assert capsys.readouterr().err == "lowcal: stopped by SIGTERM; nothing was written\n"


def test_a_damaged_checkpoint_is_passed_over_and_said_and_two_are_refused(here, monkeypatch, capsys):
    arguments = ["train", *small("epochs=4"), "--out", "out"]
    assert interrupted(arguments, 3, monkeypatch) == 130
    newest, previous = here / "out" / "checkpoint.pt", here / "out" / "checkpoint.prev.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    good = previous.read_bytes()
    previous.write_bytes(b"something else")
    refused(["train", "--resume", "--out", "out"], "checkpoint.prev.pt", capsys)
    previous.write_bytes(good)
    assert main(["train", "--resume", "--out", "out"]) == 0
    output = capsys.readouterr().out
    assert "checkpoint.pt" in output
    assert "goes on after epoch 2 of 4" in output


# As a process of its own


def test_help_and_mistakes_in_the_command_line_do_not_wait_for_torch(here):
    """All in one process, so that torch stays out of it to the end."""
    lines = ["--help", "train --help", "compare --epochs 3", "compare --recipe digit", "train --set epochs=0"]
    code = (
        "import sys; from lowcal.cli import main; codes = [main(line.split()) for line in sys.argv[1:]]; "
        "sys.exit('torch is loaded' if 'torch' in sys.modules else str(codes))"
    )
    command = [sys.executable, "-c", code, *lines, "report none --out out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1] == "[0, 0, 2, 2, 2, 2]"


def test_ctrl_c_in_training(here):
    code, error = signalled(["train", *small("epochs=5000"), "--out", "out"], signal.SIGINT, " 3/5000 ")
    assert code == 130
    assert error.count("\n") == 1
    assert error.startswith("lowcal: stopped; go on with: lowcal train ")


def test_a_schedulers_signal_saves_and_the_line_goes_on(here, capsys):
    data = "data={name: synthetic, train_images: 1000, test_images: 32, image_size: 8, classes: 4}"
    options = [*small("epochs=2"), "--set", data, "--set", "model.width=2", "--out", "out"]
    code, error = signalled(["compare", "--methods", "sgd,local", *options], signal.SIGUSR1, " 1/2 ")
    assert code == 75
    assert error.startswith("lowcal: stopped by SIGUSR1; go on with: lowcal compare ")
    assert error.count("\n") == 1
    assert main(shlex.split(error.partition("go on with: lowcal ")[2])) == 0
    assert "goes on after" in capsys.readouterr().out  # a step or, if the signal came just there, an epoch
    assert (here / "out" / "summary.json").is_file()


def start(*arguments: str) -> str:
    return f"from lowcal.cli import main; sys.exit(main({list(arguments)!r}))"


def test_ctrl_c_while_libraries_are_imported_is_one_line(here):
    stub = "import time; print('importing', flush=True)\ntry: time.sleep(1000)\nexcept BaseException: pass\n"
    (here / "typer.py").write_text(stub)  # an import may lose an exception, as those of compiled libraries do
    for number, code, by in ((signal.SIGINT, 130, ""), (signal.SIGTERM, 75, " by SIGTERM")):
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r}); {start('layers')}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            process.send_signal(number)
            _, error = process.communicate()
        assert (process.returncode, error) == (code, f"lowcal: stopped{by}; nothing was written\n")


@pytest.mark.parametrize("missing", ["typer", "rich", "yaml", "torch"])
def test_a_library_that_is_not_installed_is_named_in_one_line(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; {start('train', '--set', 'epochs=1')}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"lowcal: {missing} is not installed, which the command needs; pip install 'lowcal[cli]'\n"


def test_a_closed_pipe_is_quiet():
    command = f"{shlex.quote(sys.executable)} -m lowcal --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode in {0, 141}
    layers = ["layers", "--model", "resnet8", "--channels", "1", "--image-size", "8"]
    assert into_a_closed_pipe(layers) == (141, "")
