"""Step times of a CPU and a GPU next to each other and next to the paper, as tables for the documents.

    python benchmarks/devices.py results/bench-cpu results/h200

Reads what `performance.py` wrote in the first folder and `gpu.py`, or `lowcal bench`, in the second. Writes there:

- speedups.md: the speed-up, efficiency and memory of a step at each boundary;
- paper.md: the speed-up of whole runs under the published schedules, from step times and from FLOPs;
- savings.md: what local updates save compared with freezing, and what no schedule can exceed;
- goals.md: the project's goals for a GPU, met or missed;
- kinds.md: the kinds of step of SGD next to torch.compile;
- streams.md: local updates in line and on a second stream, if both were measured;
- course.md: the errors of a training run that was cut off, if its logs are in `COURSE`;
- training.md: the errors of the training that `gpu.py` runs, if it ended.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowcal.discovery import trace
from lowcal.experiments.bench.run import fastest_path, flops_speedup, known_schedules
from lowcal.experiments.bench.setup import forward_flops
from lowcal.experiments.reproduce.paper import paper, published
from lowcal.layers import recurring_block
from lowcal.models import build_model
from lowcal.report.table import ABSENT, Column, Table

Found = dict[str, Any]
RECIPES = {  # network of a bench -> recipe of the paper
    "resnet18-32": "resnet18-cifar10",
    "vgg13-32": "vgg13-cifar10",
    "resnet34-224": "resnet34-imagenet",
    "resnet50-224": "resnet50-imagenet",
    "mobilenet_v2-224": "mobilenet_v2-imagenet",
}
METHODS = ("local", "freeze")
SCHEDULES = {"norm-trend": "dynamic", "quadratic": "static"}
SOURCES = {"flops": "FLOPs", "cpu": "CPU", "gpu": "GPU"}
COURSE = "cifar10-jpeg-resnet18-20-epochs-cut"


def load(path: Path) -> Found | None:
    """Return a piece's JSON; None if there is none, or it ended before it had figures."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return found if found.keys() & {"rows", "before_first_step_s"} else None


def at(found: Found, method: str) -> dict[int, Found]:
    """Return a method's rows by boundary, without boundary 0."""
    return {row["boundary"]: row for row in found["rows"] if row["method"] == method and row["boundary"]}


def speedups(cpu: Mapping[str, Found], gpu: Mapping[str, Found]) -> Table:
    """Compare the steps at each boundary."""
    rows = []
    for name, slow in cpu.items():
        for method in METHODS:
            for boundary, row in at(slow, method).items():
                place = {"network": name, "method": method, "boundary": f"{boundary} of {slow['layers']}"}
                devices = {"cpu": (slow, row)}
                if name in gpu:
                    devices["gpu"] = gpu[name], at(gpu[name], method)[boundary]
                figures = {
                    f"{device}_{key}": value
                    for device, (found, each) in devices.items()
                    for key, value in {**each, "memory": _memory(found, each)}.items()
                }
                rows.append({**place, "ideal": row["ideal"], **figures})
    columns = (
        Column("network", "network"),
        Column("method", "method"),
        Column("boundary", "boundary"),
        Column("ideal", "speed-up by FLOPs", ".2f", "×"),
        Column("cpu_speedup", "CPU", ".2f", "×"),
        Column("gpu_speedup", "GPU", ".2f", "×"),
        Column("cpu_efficiency", "efficiency, CPU", ".3f"),
        Column("gpu_efficiency", "GPU", ".3f"),
        Column("cpu_memory", "memory, CPU", ".2f"),
        Column("gpu_memory", "GPU", ".2f"),
    )
    return Table(columns, rows)


def _memory(found: Found, row: Found) -> float:
    whole = next(each["peak_memory_bytes"] for each in found["rows"] if each["method"] == "sgd")
    return float(row["peak_memory_bytes"] / whole)


def whole_runs(cpu: Mapping[str, Found], gpu: Mapping[str, Found]) -> Table:
    """Compare whole runs under the published schedules with the paper's."""
    static = paper()["tables"]["table8"]["rows"]
    rows = []
    for name, slow in cpu.items():
        by_flops = _flops_of_runs(slow)
        for method in METHODS:
            row: Found = {"network": name, "method": method, "dynamic_paper": published(RECIPES[name], method)[1]}
            if method == "local" and RECIPES[name] in static:
                row["static_paper"] = static[RECIPES[name]]["local, static schedule"][2]
            for schedule, label in SCHEDULES.items():
                row[f"{label}_flops"] = by_flops[schedule, method]
                for device, found in (("cpu", slow), ("gpu", gpu.get(name))):
                    row[f"{label}_{device}"] = found and _predicted(found, schedule, method)
            rows.append(row)
    columns = [Column("network", "network"), Column("method", "method")]
    for label, heading in (("dynamic", "dynamic schedule: paper"), ("static", "static schedule: paper")):
        columns.append(Column(f"{label}_paper", heading, ".2f", "×"))
        columns += [Column(f"{label}_{source}", title, ".2f", "×") for source, title in SOURCES.items()]
        columns.append(Column("", "paper's reached by", partial(_reached, label), left=True))
    return Table(columns, rows)


def _predicted(found: Found, schedule: str, method: str) -> float:
    return next(
        float(each["speedup"])
        for each in found["predictions"]
        if (each["schedule"], each["method"]) == (schedule, method)
    )


def _flops_of_runs(found: Found) -> dict[tuple[str, str], float]:
    """Return what FLOPs alone give, by schedule and method."""
    settings = found["settings"]
    model = build_model(found["model"], classes=settings["classes"])
    images = torch.zeros(1, 3, found["image_size"], found["image_size"])
    layers = trace(model, images).layers
    flops = forward_flops(model, images, layers)
    block, epochs = recurring_block(model, layers), settings["epochs"]
    paths = {
        name: fastest_path(schedule, layers=len(layers), block=block, epochs=epochs)
        for name, schedule in known_schedules(len(layers), epochs).items()
    }
    return {(name, method): flops_speedup(method, path, flops) for name, path in paths.items() for method in METHODS}


def _reached(label: str, row: Found) -> str:
    """Name what gives at least the paper's figure, to its two decimals, under this schedule."""
    published = row.get(f"{label}_paper")
    if published is None:
        return ""
    found = {title: row[f"{label}_{source}"] for source, title in SOURCES.items()}
    return ", ".join(title for title, value in found.items() if value and round(value, 2) >= published) or "none"


def saving(speedup: float) -> float:
    """Return the part of the time that a speed-up saves."""
    return 1.0 - 1.0 / speedup


def savings(cpu: Mapping[str, Found], gpu: Mapping[str, Found]) -> Table:
    """Compare what `local` saves with what `freeze` saves; the largest boundary is 0.75 L, the published cap."""
    rows = []
    for name, slow in cpu.items():
        whole = {method: published(RECIPES[name], method)[1] or 1.0 for method in METHODS}
        last = list(at(slow, "local").values())[-1]
        row = {"network": name, "paper": whole["local"], "ideal": last["ideal"]}
        row["share"] = saving(whole["local"]) / saving(whole["freeze"])
        for device, found in (("cpu", slow), ("gpu", gpu.get(name))):
            if found is not None:
                row[device] = list(at(found, "local").values())[-1]["speedup"]
            row[f"{device}_share"], row[f"{device}_share_4"] = (_shares(found, label) for label in ("local", "local/4"))
        rows.append(row)
    columns = (
        Column("network", "network"),
        Column("paper", "`local`: paper", ".2f", "×"),
        Column("ideal", "0.75 L from the first epoch: by FLOPs", ".2f", "×"),
        Column("cpu", "CPU", ".2f", "×"),
        Column("gpu", "GPU", ".2f", "×"),
        Column("share", "saving, `local` / `freeze`: paper", ".2f"),
        Column("cpu_share", "CPU", lambda row: row["cpu_share"]),
        Column("gpu_share", "GPU", lambda row: row["gpu_share"]),
        Column("cpu_share_4", "`local/4` / `freeze`: CPU", lambda row: row["cpu_share_4"]),
        Column("gpu_share_4", "GPU", lambda row: row["gpu_share_4"]),
    )
    return Table(columns, rows)


def _shares(found: Found | None, label: str) -> str:
    """Return the least and the largest ratio of the savings of `label` and `freeze`."""
    if found is None or not at(found, label):
        return ABSENT
    frozen = at(found, "freeze")
    ratios = [saving(row["speedup"]) / saving(frozen[place]["speedup"]) for place, row in at(found, label).items()]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def goals(folder: Path) -> list[Found]:
    """Return the goals for a GPU with what the files in `folder` say: the least and largest figure, and the verdict."""

    def of_gpu(name: str) -> Found | None:
        found = load(folder / f"{name}.json")
        return found if found and found["environment"]["device"].startswith("cuda") else None

    timed = {name: of_gpu(f"{name}-graphed") for name in RECIPES}
    overlapped = {name: of_gpu(f"{name}-overlapped") for name in RECIPES}
    eager, first = of_gpu("resnet18-32-eager"), of_gpu("first-step")
    kinds = {name: of_gpu(f"kinds-{name}") for name in ("resnet18-32", "resnet50-224")}
    small, large = ("resnet18-32", "vgg13-32"), ("resnet50-224", "mobilenet_v2-224")

    def each(
        names: Sequence[str], figure: Callable[[Found], list[float]], files: Mapping[str, Found | None] = timed
    ) -> list[float]:
        return [value for name in names if (found := files[name]) for value in figure(found)]

    rows = [
        ("efficiency of local, graphed: ResNet18 and VGG13, 32x32", each(small, _efficiencies), ">=", 0.97),
        (
            "local / freeze, local updates on a second stream: ResNet18 and VGG13, 32x32",
            each(small, _over_freeze, overlapped),
            "<=",
            1.10,
        ),
        ("efficiency of local, graphed: ResNet50 and MobileNetV2, 224x224", each(large, _efficiencies), ">=", 0.98),
        ("local / sgd, eager: ResNet18, 32x32, half of the layers", _eager_ratio(eager), "<=", 0.95),
        (
            "sgd graphed / plain loop: ResNet18, 32x32",
            [value for files in (timed, overlapped, kinds) for value in each(small[:1], _over_plain, files)],
            "<=",
            0.20,
        ),
        *(
            (f"sgd / plain loop under torch.compile, reduce-overhead: {name}", _over_compiled(found), "<=", 1.00)
            for name, found in kinds.items()
        ),
        (
            "seconds before the first step of a compare with three arms, step=auto",
            [first["before_first_step_s"]] if first else [],
            "<=",
            10.0,
        ),
    ]
    return [_goal(*row) for row in rows]


def _goal(what: str, values: list[float], sense: str, goal: float) -> Found:
    if not values:
        verdict = "not measured on a GPU yet"
    else:
        verdict = "met" if (min(values) >= goal if sense == ">=" else max(values) <= goal) else "missed"
    found = {"least": min(values, default=None), "most": max(values, default=None)}
    return {"what": what, **found, "sense": sense, "goal": goal, "verdict": verdict}


def _efficiencies(found: Found) -> list[float]:
    return [row["efficiency"] for row in at(found, "local").values()]


def _over_freeze(found: Found) -> list[float]:
    frozen = at(found, "freeze")
    return [row["step_ms"] / frozen[place]["step_ms"] for place, row in at(found, "local").items()]


def _over_plain(found: Found) -> list[float]:
    own = next(row for row in found["rows"] if row["method"] == "sgd" and row.get("step", "graphed") == "graphed")
    return [own["step_ms"] / found["plain_step_ms"]]


def _eager_ratio(found: Found | None) -> list[float]:
    """Return the ratio at the second boundary."""
    return [row["step_ms"] / found["rows"][0]["step_ms"] for row in at(found, "local").values()][1:2] if found else []


def _over_compiled(found: Found | None) -> list[float]:
    """Return our fastest step over that of the compiled plain loop, if that was compiled in time."""
    rows = found["rows"] if found else []
    rival = [row["step_ms"] for row in rows if row["step"] == "torch.compile, reduce-overhead"]
    own = [row["step_ms"] for row in rows if row["method"] == "sgd"]
    return [min(own) / rival[0]] if rival else []


def goals_table(rows: Sequence[Found]) -> Table:
    """Show the goals."""

    def figure(row: Found) -> str:
        least, most = row["least"], row["most"]
        if least is None:
            return ABSENT
        return f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"

    columns = (
        Column("what", "what"),
        Column("", "measured", figure),
        Column("", "goal", lambda row: f"{'at least' if row['sense'] == '>=' else 'at most'} {row['goal']:.2f}"),
        Column("verdict", "verdict"),
    )
    return Table(columns, rows)


def streams(folder: Path) -> Table | None:
    """Compare local updates in line with those on a second stream; None where not both were measured."""
    rows: list[Found] = []
    for name in RECIPES:
        line, second = (load(folder / f"{name}-{kind}.json") for kind in ("graphed", "overlapped"))
        for boundary in at(second, "local") if line and second else ():
            row: Found = {"network": name, "boundary": f"{boundary} of {line['layers']}"}
            for key, found in (("line", line), ("second", second)):
                local, frozen = (at(found, method)[boundary] for method in METHODS)
                row[f"{key}_ratio"] = local["step_ms"] / frozen["step_ms"]
                row[f"{key}_memory"] = _memory(found, local)
            rows.append(row)
    columns = (
        Column("network", "network"),
        Column("boundary", "boundary"),
        Column("line_ratio", "time of local / freeze: in line", ".2f"),
        Column("second_ratio", "second stream", ".2f"),
        Column("line_memory", "memory of local / sgd: in line", ".2f"),
        Column("second_memory", "second stream", ".2f"),
    )
    return Table(columns, rows) if rows else None


def kinds(folder: Path) -> Table | None:
    """Show the kinds of step of SGD and the plain loop under torch.compile; None where they were not measured."""
    rows: list[Found] = []
    for name in RECIPES:
        found = load(folder / f"kinds-{name}.json")
        for row in found["rows"] if found else ():
            if row["method"] != "local":
                label = f"step={row['step']}" if row["method"] == "sgd" else f"plain loop, {row['step']}"
                rows.append({"network": name, **row, "label": label})
    columns = (
        Column("network", "network"),
        Column("label", "step"),
        Column("step_ms", "ms", ".2f"),
        Column("plain_over_step", "plain loop / step", ".2f", "×"),
        Column("ready_s", "seconds until it runs", lambda row: f"{max(row['ready_s'], 0.0):.0f}"),
    )
    return Table(columns, rows) if rows else None


def cut_off(folder: Path) -> Table:
    """Show a run of which the logs METHOD.jsonl in `folder` are left."""
    logs = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in ("sgd", *METHODS, "refresh")}
    return course({name: [json.loads(line) for line in lines] for name, lines in logs.items()})


def course(logs: Mapping[str, Sequence[Found]]) -> Table:
    """Show the errors of each method from epoch to epoch, from its records."""
    rows: list[Found] = []
    for epoch in range(max(map(len, logs.values()))):
        known = {method: log[epoch] for method, log in logs.items() if epoch < len(log)}
        errors = {method: record["top1_error"] for method, record in known.items()}
        boundaries = {f"{method}_boundary": record["boundary"] for method, record in known.items()}
        rows.append({"epoch": epoch + 1, **errors, **boundaries})
    columns = (
        Column("epoch", "epoch", "number"),
        Column("sgd", "top-1 error, %: sgd", ".2f"),
        *(
            column
            for method in list(logs)[1:]
            for column in (Column(method, method, ".2f"), Column(f"{method}_boundary", "boundary", "number"))
        ),
    )
    return Table(columns, rows)


def main(cpu_folder: Path, gpu_folder: Path) -> None:
    """Write all tables."""
    cpu = {name: found for name in RECIPES if (found := load(cpu_folder / f"{name}.json"))}
    gpu = {name: found for name in RECIPES if (found := load(gpu_folder / f"{name}-graphed.json"))}
    tables = {"speedups": speedups(cpu, gpu), "paper": whole_runs(cpu, gpu), "savings": savings(cpu, gpu)}
    tables["goals"] = goals_table(goals(gpu_folder))
    optional = {"streams": streams(gpu_folder), "kinds": kinds(gpu_folder)}
    tables |= {name: table for name, table in optional.items() if table is not None}
    if (gpu_folder / COURSE).is_dir():
        tables["course"] = cut_off(gpu_folder / COURSE)
    if (path := gpu_folder / "training.json").is_file():
        tables["training"] = course(json.loads(path.read_text())["course"])
    for name, table in tables.items():
        table.write(gpu_folder / name, ("md",))
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
