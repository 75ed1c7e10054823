"""The command as a person meets it: results, mistakes, interruptions, pipes."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowcal.cli import main
from lowcal.training.run import Run

# A network and images small enough for a test: 64 images, 2 epochs, four steps each.
SMALL = [
    "epochs=2",
    "batch=16",
    "model.width=4",
    "data={name: synthetic, train_images: 64, test_images: 32, image_size: 8, classes: 4}",
    "local.schedule={name: fixed, epochs: {1: 3}}",
]


def small(*settings: str) -> list[str]:
    return [part for setting in (*SMALL, *settings) for part in ("--set", setting)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, in which the default folders are made too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def lines(path: Path) -> list[dict]:
    timed = {"seconds", "total_seconds", "step_ms", "images_per_second"}
    records = [json.loads(line) for line in (path / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


# What it does


def test_compare_prints_one_table_and_writes_runs_and_report(here, capsys):
    assert main(["compare", *small(), "--methods", "sgd,local", "--seeds", "2", "--out", "out"]) == 0
    text = capsys.readouterr().out
    first, *others = text.splitlines()
    assert first == (
        "ResNet8 of width 4 on synthetic images (4 classes, 8x8), 2 epochs, 64 images: sgd, local, 2 seeds each; in out"
    )
    assert max(map(len, others)) <= 100
    table = text[text.index("method") :].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert [line.split()[0] for line in table[2:4]] == ["sgd", "local"]
    assert table[3].endswith("3/10")
    assert "out/report.html" in text
    assert {entry.name for entry in (here / "out").iterdir()} == {
        *(f"{method}-seed{seed}" for method in ("sgd", "local") for seed in (0, 1)),
        *("summary.json", "summary.csv", "summary.md", "report.html"),
    }
    rows = json.loads((here / "out" / "summary.json").read_text())["rows"]
    fields = "method seeds epochs top1_error top1_error_std seconds speedup flops_ratio peak_memory_bytes boundary"
    assert set(fields.split()) <= set(rows[0])
    assert [row["seeds"] for row in rows] == [2, 2]
    # An arm in a comparison trains as it does alone.
    assert main(["train", "--method", "local", *small("seed=1"), "--out", "alone"]) == 0
    assert lines(here / "alone") == lines(here / "out" / "local-seed1")


def test_a_growing_batch_is_told_and_reported(here, capsys):
    settings = ["epochs=3", "batch.grow=true", "batch.memory_limit=1GiB"]
    assert main(["compare", "--methods", "sgd,local", *small(*settings), "--out", "out"]) == 0
    assert "local-seed0: batch 32 from epoch 3 on" in capsys.readouterr().out.splitlines()
    assert [record["batch"] for record in lines(here / "out" / "local-seed0")] == [16, 16, 32]
    assert [record["batch"] for record in lines(here / "out" / "sgd-seed0")] == [16, 16, 16]
    assert "Batch: local-seed0 16, from epoch 3 on 32." in (here / "out" / "summary.md").read_text()


def test_output_that_is_no_terminal_holds_no_control_characters(here, capsys):
    assert main(["train", *small(), "--out", "out"]) == 0
    captured = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", captured.out)
    assert captured.err == ""
    assert len(re.findall(r"^local-seed0  [12]/2  loss \d", captured.out, re.M)) == 2


def test_quiet_prints_the_results_alone(here, capsys):
    assert main(["train", *small(), "--out", "out", "--quiet"]) == 0
    result, place = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"local: top-1 error \d+\.\d\d %, training .*, boundary 3/10", result)
    assert place == "run: out"


def test_without_out_each_run_gets_a_folder_of_its_own(here, capsys):
    for _ in range(2):
        assert main(["train", "--method", "sgd", *small("epochs=1"), "--quiet"]) == 0
    assert sorted(entry.name for entry in (here / "runs").iterdir()) == ["digits-sgd", "digits-sgd-2"]


def test_a_finished_comparison_is_reported_again_and_can_grow(here, capsys):
    assert main(["compare", *small("epochs=1"), "--methods", "sgd", "--out", "out", "--quiet"]) == 0
    before = (here / "out" / "sgd-seed0" / "epochs.jsonl").read_bytes()
    assert main(["compare", *small("epochs=1"), "--methods", "sgd,freeze", "--out", "out"]) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert (here / "out" / "sgd-seed0" / "epochs.jsonl").read_bytes() == before


def test_layers_lists_the_network_in_execution_order(capsys):
    options = ["layers", "--model", "resnet8", "--channels", "1", "--image-size", "8", "--epochs", "30"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ 2  stages\.0\.0\.conv1 .* Conv2d  16x16x3x3 +2,304 +295 k +2$", text, re.M)
    assert "3 layers a move, 12 epochs between moves at least, 7 layers at most" in text
    assert main([*options, "--json"]) == 0
    network = json.loads(capsys.readouterr().out)
    assert (network["shift"], network["interval"], network["most_local"]) == (3, 12, 7)
    assert network["layers"][1]["flops"] == 2 * 8 * 8 * 16 * 16 * 9
    assert network["layers"][-1]["followers"] == []


def test_layers_flops_are_those_of_torchs_counter(capsys):
    from torch.utils.flop_counter import FlopCounterMode

    from lowcal.models import build_model

    assert main(["layers", "--model", "mobilenet_v2", "--classes", "7", "--json"]) == 0
    network = json.loads(capsys.readouterr().out)
    model = build_model("mobilenet_v2", classes=7).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(layer["flops"] for layer in network["layers"]) == counter.get_total_flops()


def test_report_joins_runs(here, capsys):
    for method, epochs in (("sgd", 2), ("local", 1)):
        assert main(["train", "--method", method, *small(f"epochs={epochs}"), "--out", method, "--quiet"]) == 0
    assert main(["report", "sgd", "local", "--out", "both"]) == 0
    shown = capsys.readouterr().out
    assert "both/report.html" in shown
    assert "Trained for different epochs: sgd 2, local 1." in shown.splitlines()
    assert (here / "both" / "report.html").is_file()


def test_titles_say_what_ran_and_not_what_the_recipe_is_called(here, capsys):
    folders(here / "pets", {"cat": 4, "dog": 4})
    options = [*IMAGES, "--set", "model.width=8", "--set", "batch=4", "--data-dir", "pets", "--out", "out"]
    assert main(["compare", "--recipe", "resnet18-cifar10", "--methods", "sgd,local", *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    told = "ResNet18 of width 8 on the image folder 'pets' (2 classes, 8x8), 1 epoch, 8 images"
    assert output.count(told) == 1  # the first line comes before the images are counted
    assert "recipe: resnet18-cifar10 with epochs=1, batch=4, model.width=8, data.name=image-folder" in output
    written = [(here / "out" / name).read_text() for name in ("summary.json", "summary.md", "report.html")]
    for text in (output, *written):
        assert "CIFAR-10" not in text
        assert "published" not in text
    assert json.loads(written[0])["title"] == told
    assert told in written[1]
    assert f"<title>{told}</title>".replace("'", "&#39;") in written[2]
    assert "The boundary of local never moved" in output


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["compare", "--help"], ["--version"]])
def test_help_and_version(arguments, capsys):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "lowcal" in captured.out
    assert captured.err == ""


def test_no_line_of_the_help_is_cut_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out.partition("Commands:")[2]
    assert "bench" in commands
    assert "..." not in commands


# Mistakes


def folders(root: Path, classes: dict[str, int]) -> Path:
    for part in ("train", "test"):
        for label, count in classes.items():
            (root / part / label).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (index * 10, 40, 90)).save(root / part / label / f"{index}.png")
    return root


def broken(root: Path, content: bytes) -> Path:
    folders(root, {"cat": 4, "dog": 4})
    (root / "train" / "cat" / "2.png").write_bytes(content)
    return root


IMAGES = ["--set", "data={name: image-folder, image_size: 8}", "--set", "batch=2", "--set", "epochs=1"]

WRONG = {
    "no such command": (["compar"], "'compare'"),
    "no such option": (["compare", "--recipee", "digits"], "'--recipe'"),
    "option of other programs": (["compare", "--epochs", "3"], "no option '--epochs'; use --set epochs=3"),
    "the same with =": (["train", "--epochs=3"], "no option '--epochs'; use --set epochs=3"),
    "rate": (["train", "--lr", "0.1", "--quiet"], "no option '--lr'; use --set optimizer.lr=0.1"),
    "option without its value": (["train", "--seed", "--quiet"], "no option '--seed'; use --set seed=VALUE"),
    "value for a shell": (["train", "--precision", "a b"], "use --set 'precision=a b'"),
    "option of a section": (["train", "--decay-every", "3"], "no option '--decay-every'; use --set local"),
    "command without settings": (["layers", "--lr", "1"], "no option '--lr'; "),
    "seeds 0": (["compare", "--seeds", "0"], "'--seeds'"),
    "recipe": (["compare", "--recipe", "digit"], "did you mean 'digits'"),
    "method": (["compare", "--methods", "sgd,lokal"], "did you mean 'local'"),
    "methods combined": (["compare", "--methods", "sgd,local+prune"], "methods cannot be combined yet; choose one"),
    "method that does not apply": (
        ["train", "--method", "stochastic-depth", "--set", "model.name=vgg13", "--set", "data.name=synthetic"],
        "stochastic-depth drops residual blocks, and VGG has none that it knows",
    ),
    "step without a GPU": (
        ["train", "--device", "cpu", "--set", "step=graphed"],
        "the step 'graphed' needs a CUDA device, and this network is on cpu; use 'eager' or 'compiled'",
    ),
    "step that does not fit the method": (
        ["train", "--method", "sgd", "--device", "cpu", "--set", "step=compile"],
        "step=compile: must be 'auto', 'eager', 'compiled' or 'graphed'",
    ),
    "method of train": (["train", "--method", "freese"], "did you mean 'freeze'"),
    "method twice": (["compare", "--methods", "sgd,sgd"], "twice"),
    "model": (["compare", "--set", "model.name=resnet9"], "did you mean"),
    "model and channels": (["compare", "--set", "model.name=mobilenet_v2"], "3 channels"),
    "model and width": (["layers", "--model", "alexnet", "--width", "8"], "width"),
    "key": (["compare", "--set", "schedule.alpha=1"], "did you mean 'local.schedule.alpha'"),
    "epochs": (["compare", "--set", "epochs=0"], "epochs=0"),
    "too many layers": (["compare", *small("local.schedule.epochs={1: 10}")], "10 layers at epoch 1"),
    "data folder": (["compare", *IMAGES, "--data-dir", "none"], "none"),
    "no data folder": (["compare", *IMAGES], "--data-dir"),
    "no image": (["compare", *IMAGES, "--data-dir", "text"], "2.png"),
    "device": (["compare", "--device", "gpu"], "unknown device 'gpu'"),
    "absent device": (["compare", "--device", "cuda:99"], "--device cpu"),
    "resume without folder": (["train", "--resume"], "--out"),
    "report of nothing": (["report", "none", "--out", "out"], "none"),
    "report without folder": (["report", "empty"], "--out"),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=list(WRONG))
def test_a_mistake_ends_in_one_line_that_names_it_and_writes_nothing(here, arguments, expected, capsys):
    if "--data-dir" in arguments:
        broken(here / "text", b"not an image at all")
    elif "empty" in arguments:
        (here / "empty").mkdir()
    before = sorted(path for path in here.rglob("*") if "cache" not in path.parts)
    refused(arguments, expected, capsys)
    assert sorted(path for path in here.rglob("*") if "cache" not in path.parts) == before


def refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowcal: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert expected in error
    assert "Traceback" not in error


def test_unusable_images_are_skipped_and_counted_by_a_setting(here, capsys):
    broken(here / "data", b"not an image at all")
    arguments = [*IMAGES, "--set", "data.on_error=skip", "--data-dir", "data", "--out", "out"]
    assert main(["train", "--method", "sgd", "--set", "model.width=4", *arguments]) == 0
    output = capsys.readouterr().out
    assert "skipped 1" in output
    assert "2.png" in output


@pytest.mark.parametrize("command", ["compare", "train"])
@pytest.mark.parametrize("kind", ["file", "strangers", "below a file"])
def test_a_folder_that_is_not_ours_is_refused_before_any_work(here, command, kind, capsys, monkeypatch):
    monkeypatch.setattr("lowcal.experiments.assemble.load", None)
    out = here / "out"
    if kind == "strangers":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine")
    place = out / "deep" / "deeper" if kind == "below a file" else out
    refused([command, *small(), "--out", str(place)], "choose another --out", capsys)
    left = [path.name for path in here.rglob("*") if not path.is_relative_to(here / "cache")]  # matplotlib's fonts
    assert left == (["out", "thesis.tex"] if kind == "strangers" else ["out"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused(capsys):
    refused(["compare", *small(), "--out", "/proc/lowcal"], "cannot write to /proc/lowcal", capsys)


def test_runs_of_another_recipe_are_not_mixed(here, capsys):
    assert main(["compare", *small(), "--methods", "sgd", "--out", "out", "--quiet"]) == 0
    capsys.readouterr()
    refused(["compare", *small("epochs=3"), "--out", "out"], "epochs (2 there, 3 here)", capsys)
    refused(["train", *small(), "--out", "out"], "is not a run", capsys)
    refused(["compare", *small(), "--out", "out/sgd-seed0"], "is a single run", capsys)
    refused(["train", *small(), "--out", "out/sgd-seed0"], "holds a run already", capsys)
    resume = ["train", "--resume", "--out", "out/sgd-seed0"]
    refused([*resume, "--set", "local.lr=0.5"], "local.lr (", capsys)
    refused([*resume, "--recipe", "resnet18-cifar10"], "another recipe", capsys)
    refused([*resume, "--method", "freeze"], "is a run of 'sgd', not of 'freeze'", capsys)
    assert main(resume) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_run_is_not_resumed_on_images_of_other_classes(here, monkeypatch, capsys):
    folders(here / "pets", {"cat": 4, "dog": 4})
    folders(here / "more", {"cat": 4, "cow": 4, "dog": 4})
    options = [*IMAGES, "--set", "model.width=8", "--set", "epochs=3", "--method", "sgd", "--out", "out"]
    assert interrupted(["train", *options, "--data-dir", "pets"], 1, monkeypatch) == 130
    capsys.readouterr()
    refused(["train", "--resume", "--out", "out", "--data-dir", "more"], "started on images of 2 classes", capsys)
    assert main(["train", "--resume", "--out", "out", "--data-dir", "pets", "--quiet"]) == 0


def interrupted(arguments: list[str], epochs: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """`main`, with Ctrl-C in the first epoch after `epochs` epochs of all runs together."""
    whole = Run.run_epoch
    left = [epochs]

    def run_epoch(run, progress=None):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(run, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "run_epoch", run_epoch)
        return main(arguments)


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


def test_a_diverging_run_stops_and_says_where(here, capsys):
    refused(["train", "--method", "sgd", *small("optimizer.lr=1e30"), "--out", "out"], "step", capsys)


# As a process of its own


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["compare", "--epochs", "3"],
        ["compare", "--recipe", "digit"],
        ["train", "--set", "epochs=0"],
        ["report", "none", "--out", "out"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_in_the_command_line_do_not_wait_for_torch(here, arguments):
    code = (
        "import sys; from lowcal.cli import main; main(sys.argv[1:]); "
        "sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_real_ctrl_c_in_a_process(here):
    command = [sys.executable, "-m", "lowcal", "train", *small("epochs=5000"), "--out", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " 3/5000 " in line:
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert error.startswith("lowcal: stopped; go on with: lowcal train ")


def test_a_schedulers_signal_in_a_process_saves_and_the_line_goes_on(here, capsys):
    data = "data={name: synthetic, train_images: 1000, test_images: 32, image_size: 8, classes: 4}"
    options = [*small("epochs=2"), "--set", data, "--out", "out"]
    arguments = [sys.executable, "-m", "lowcal", "compare", "--methods", "sgd,local", *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " 1/2 " in line:
                break
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate(timeout=120)
    error = error.removeprefix("Matplotlib is building the font cache; this may take a moment.\n")  # on a new machine
    assert process.returncode == 75
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


def test_a_closed_pipe_is_quiet(here):
    command = f"{shlex.quote(sys.executable)} -m lowcal layers --model resnet18 | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode in {0, 141}


def test_a_published_recipe_trains_in_low_precision(here):
    data = "data={name: synthetic, train_images: 16, test_images: 8, image_size: 8, classes: 2}"
    settings = ["epochs=1", "batch=8", "model.width=4", "precision=bf16", data]
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", "--recipe", "resnet18-cifar10-modern", *options, "--out", "run", "--quiet"]) == 0
