"""The README's quick start runs as it stands, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_and_the_boundary_moves(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    boundaries = [int(line.split()[-6]) for line in capsys.readouterr().out.splitlines()]
    assert boundaries == [1, 2, 2, 2]
    assert len(code.splitlines()) <= 16


def fact(name):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
    return [float(figure) for figure in re.findall(r"\*\*([\d.]+)", row)]


def test_the_recorded_step_on_a_gpu():
    found = json.loads((ROOT / "results/h200/kinds-resnet18-32.json").read_text())
    ours = next(row["step_ms"] for row in found["rows"] if (row["step"], row["method"]) == ("graphed", "sgd"))
    rival = next(row["step_ms"] for row in found["rows"] if row["step"] == "torch.compile, reduce-overhead")
    times = [found["plain_step_ms"] / ours, rival / ours]
    assert fact("a recorded step") == [round(time, 1) for time in times]


def test_step_time_and_memory_on_a_gpu():
    rows = json.loads((ROOT / "results/h200/resnet50-224-graphed.json").read_text())["rows"]
    sgd, local, freeze = (
        next(row for row in rows if (row["method"], row["boundary"]) == at)
        for at in (("sgd", 0), ("local", 27), ("freeze", 27))
    )
    times = [sgd["step_ms"] / row["step_ms"] for row in (local, freeze)]
    assert fact("time of a training step") == [round(time, 2) for time in times]
    memory = {round(row["peak_memory_bytes"] / sgd["peak_memory_bytes"], 2) for row in (local, freeze)}
    assert memory == set(fact("peak memory of that step"))


def test_time_of_a_whole_run():
    lines = (ROOT / "results/bench-cpu/whole-runs.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| mobilenet_v2")
    ]
    measured = {row[1]: float(row[4].rstrip("×")) for row in cells}
    assert fact("time of a whole run") == [measured["local"], measured["freeze"]]


def test_fault_trials():
    lines = (ROOT / "results/faults.md").read_text().splitlines()[2:]
    counts = [[int(cell) for cell in line.strip("|").split("|")[-2:]] for line in lines]
    tried, lossless = (sum(column) for column in zip(*counts, strict=True))
    assert tried == lossless == fact("exact resume")[0]


def test_fine_tuning():
    rows = json.loads((ROOT / "results/finetune/efficientnet-summary.json").read_text())["rows"]
    arms = {(row["family"], row["epochs"]): row for row in rows}
    rival = max((row for row in rows if row["family"] == "all layers"), key=lambda row: row["accuracy"])
    frozen, last_block = arms["3/4 frozen", 4], arms["last block, cached", 8]
    points = frozen["accuracy"] - rival["accuracy"]
    assert last_block["accuracy"] > rival["accuracy"]
    assert fact("fine-tuning") == [round(points, 1), round(frozen["speedup"], 1), round(last_block["speedup"], 1)]


def test_what_the_demo_of_fine_tuning_wins():
    rows = json.loads((ROOT / "results/finetune/demo.json").read_text())["rows"]
    errors = {row["method"].partition("-")[2] or row["method"]: row["top1_error"] for row in rows}
    points = round(errors["compressed-2"] - errors["freeze"], 1)
    assert f"three\nquarters frozen have {points} points less error than SGD" in README
