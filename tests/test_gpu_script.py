"""benchmarks/gpu.py on the CPU with tiny networks, and the tables that benchmarks/devices.py makes of GPU figures."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

import devices
import gpu
from common import RESULTS
from lowcal.errors import LowcalError
from pieces import Job, Piece, run


@pytest.fixture
def script(monkeypatch, tmp_path):
    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return ended.value.code

    return start


def read(folder):
    """Every file of a run by name; all of them must be JSON."""
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}


def test_each_piece_writes_its_file(script, tmp_path, capfd):
    for pattern in ("smoke-local", "tests", "*-32-eager", "kinds-*", "first-step", "training"):
        assert script("--minutes", "30", "--only", pattern) == 0
    found = read(tmp_path)
    assert all(facts["status"] == "done" for name, facts in found.items() if name != "summary")
    assert all(found[name]["environment"]["torch"] == torch.__version__ for name in found if name != "summary")
    assert [line["outcome"] for line in found["smoke-local"]["lines"]] == ["ok"]
    assert found["tests"]["counts"]["failed"] == 0
    assert found["resnet18-32-eager"]["model"] == "resnet8"
    assert {row["step"] for row in found["kinds-resnet18-32"]["rows"]} == {"eager"}
    assert 0 < found["first-step"]["before_first_step_s"] < 60
    epochs = found["training"]["epochs"]
    assert {name: len(log) for name, log in found["training"]["course"].items()} == dict.fromkeys(
        ("sgd", "local", "freeze"), min(epochs, 3)
    )
    assert found["summary"]["pieces"][0]["piece"] == "training"
    assert "not measured on a GPU yet" in capfd.readouterr().out
    assert script("--only", "smoke-none") == 2


def fail(job, record):
    record.add(rows=[1])
    raise LowcalError("it does not fit\nand more")


def crash(job, record):
    record.add(rows=[2])
    os.kill(os.getpid(), signal.SIGKILL)


def hang(job, record):
    for number in range(600):
        record.add(rows=[number])
        time.sleep(0.1)


def end(job, record):
    record.add(left=job.until - time.monotonic())


def test_a_piece_that_fails_crashes_or_takes_too_long_takes_nothing_with_it(tmp_path):
    every = {"fail": fail, "crash": crash, "hang": hang, "end": end}
    pieces = {name: Piece(each, 3.0) for name, each in every.items()}
    left_out = run(pieces, Job("cpu"), tmp_path, 12 * 60.0)
    found = read(tmp_path)
    assert {name: found[name]["status"] for name in every} == {
        "fail": "failed", "crash": "crashed", "hang": "cut off", "end": "done",
    }  # fmt: skip
    assert found["fail"]["reason"] == "LowcalError: it does not fit"
    assert found["crash"]["reason"] == "exit code -9"
    assert found["hang"]["reason"] == "it took longer than 3 s"
    assert all(found[name]["rows"] for name in ("fail", "crash", "hang")), "what was measured before"
    assert [each["piece"] for each in found["summary"]["pieces"]] == list(every)
    assert [line.split(":")[0] for line in left_out] == ["fail", "crash", "hang"]


def test_time_is_kept_for_the_last_piece(tmp_path):
    pieces = {"first": Piece(end, 1e9), "last": Piece(end, 1e9)}
    assert run(pieces, Job("cpu"), tmp_path, 20.0, reserve=19.5) == ["first: left out: no time was left"]
    assert 10.0 < read(tmp_path)["last"]["left"] < 20.0


def test_the_pieces_for_a_gpu_cover_the_networks_and_the_kinds_of_step():
    found = gpu.all_pieces(small=False, cuda=True)
    names = list(found)
    assert {f"{name}-graphed" for name in devices.RECIPES} < set(names)
    assert {"resnet18-32-eager", "kinds-resnet18-32", "kinds-resnet50-224", "first-step", "smoke-compiled"} < set(names)
    assert {"resnet18-32-overlapped", "vgg13-32-overlapped", "smoke-overlapped"} < set(names)
    assert found["vgg13-32-overlapped"].run.args[0].step == "graphed-overlapped"
    assert names[0] == "smoke-sgd"
    assert names[-1] == "training"
    settings = found["resnet50-224-graphed"].run.args[0]
    assert (settings.step, settings.precision, settings.batch, settings.channels_last) == ("graphed", "bf16", 64, True)


def step_rows(**speedups):
    """A bench's JSON: the methods' speed-ups at 5 of 10 layers."""
    rows = [{"method": "sgd", "boundary": 0, "speedup": 1.0, "ideal": 1.0, "step_ms": 1.0, "peak_memory_bytes": 2}]
    for method, speedup in speedups.items():
        place = {"method": method.replace("_", "/"), "boundary": 5, "efficiency": 0.9, "peak_memory_bytes": 1}
        rows.append({**place, "speedup": speedup, "ideal": 1.2, "step_ms": 1.0 / speedup})
    return {"layers": 10, "rows": rows, "plain_step_ms": 4.0, "environment": {"device": "cuda"}}


def test_what_local_updates_save_compared_with_freezing():
    # local saves 0.2 of the time, freeze 0.5, local/4 0.375
    cpu = {"resnet18-32": step_rows(local=1.25, freeze=2.0, local_4=1.6), "vgg13-32": step_rows(local=2, freeze=2)}
    row, other = devices.savings(cpu, {"resnet18-32": step_rows(local=2.0, freeze=2.0)}).rows
    assert (row["paper"], row["ideal"], row["cpu"], row["gpu"]) == (1.51, 1.2, 1.25, 2.0)
    assert row["share"] == pytest.approx((1 - 1 / 1.51) / (1 - 1 / 1.65))
    assert (row["cpu_share"], row["cpu_share_4"]) == ("0.40 to 0.40", "0.75 to 0.75")
    assert (row["gpu_share"], row["gpu_share_4"], other["gpu_share"]) == ("1.00 to 1.00", "–", "–")


def test_a_cpu_and_a_gpu_stand_next_to_each_other():
    cpu = {name: step_rows(local=1.25, freeze=2.0) for name in ("resnet18-32", "vgg13-32")}
    rows = devices.speedups(cpu, {"vgg13-32": step_rows(local=1.1, freeze=1.5)}).rows
    assert [(row["network"], row["cpu_speedup"], row.get("gpu_speedup")) for row in rows] == [
        ("resnet18-32", 1.25, None), ("resnet18-32", 2.0, None), ("vgg13-32", 1.25, 1.1), ("vgg13-32", 2.0, 1.5),
    ]  # fmt: skip
    assert rows[2]["gpu_memory"] == 0.5


def test_goals_are_met_missed_or_not_measured(tmp_path):
    def verdicts():
        return [goal["verdict"] for goal in devices.goals(tmp_path)]

    assert set(verdicts()) == {"not measured on a GPU yet"}
    eager = {"step": "eager", "method": "sgd", "step_ms": 9.0}
    kinds = {"plain_step_ms": 10.0, "rows": [eager, {"step": "graphed", "method": "sgd", "step_ms": 2.0}]}
    rival = {"step": "torch.compile, reduce-overhead", "method": "plain loop", "step_ms": 3.0}
    files = {
        "resnet18-32-graphed": step_rows(local=1.9, freeze=2.0),
        "resnet18-32-overlapped": step_rows(local=1.95, freeze=2.0),
        "resnet50-224-graphed": {"status": "cut off"},
        "kinds-resnet18-32": kinds | {"rows": [*kinds["rows"], rival]},
        "kinds-resnet50-224": kinds,
        "first-step": {"before_first_step_s": 11.0},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": {"device": "cuda"}} | content))
    unknown = "not measured on a GPU yet"
    assert verdicts() == ["missed", "met", unknown, unknown, "missed", "met", unknown, "missed"]
    plain = devices.goals(tmp_path)[4]
    assert (plain["least"], plain["most"]) == (2.0 / 10.0, 1.0 / 4.0)


def test_kinds_of_step_are_those_of_sgd(tmp_path):
    assert devices.kinds(tmp_path) is None
    rows = [
        {"step": "graphed", "method": method, "step_ms": 2.0, "plain_over_step": 5.0, "ready_s": 0.1}
        for method in ("sgd", "local")
    ]
    (tmp_path / "kinds-resnet50-224.json").write_text(json.dumps({"rows": rows}))
    (row,) = devices.kinds(tmp_path).rows
    assert (row["network"], row["label"]) == ("resnet50-224", "step=graphed")


def test_local_updates_in_line_and_on_a_second_stream(tmp_path):
    assert devices.streams(tmp_path) is None
    for name, speedup in (("vgg13-32-graphed", 1.25), ("vgg13-32-overlapped", 1.6), ("resnet18-32-graphed", 1.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(step_rows(local=speedup, freeze=2.0)))
    (row,) = devices.streams(tmp_path).rows
    assert (row["network"], row["boundary"]) == ("vgg13-32", "5 of 10")
    assert (row["line_ratio"], row["second_ratio"]) == (1.6, 1.25)
    assert (row["line_memory"], row["second_memory"]) == (0.5, 0.5)


def test_the_tables_of_the_documents_are_those_of_the_results(tmp_path):
    for name in ("bench-cpu", "h200"):
        shutil.copytree(RESULTS / name, tmp_path / name)
    for file in (tmp_path / "h200").glob("*.md"):
        if file.name != "README.md":
            file.unlink()
    devices.main(tmp_path / "bench-cpu", tmp_path / "h200")
    for file in (RESULTS / "h200").glob("*.md"):
        assert (tmp_path / "h200" / file.name).read_text() == file.read_text(), "run benchmarks/devices.py"
