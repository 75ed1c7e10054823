"""The ways to run a step beside one another: `step_kinds.py --device cpu --out results/bench-cpu`.

Times the steps of sgd, local and freeze in each way that the device has, in turn in one process, beside the plain loop;
and what passes until a step runs at full speed: at the start, and after a move, compiling and recording included.
torch.compile begins with an empty cache. Writes OUT/NETWORK-kinds.json and .md.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from bench_networks import NETWORKS
from bench_table import time
from lowcal.experiments.assemble import find_device
from lowcal.experiments.backends import kernels
from lowcal.experiments.bench_settings import BenchSettings
from lowcal.experiments.timing import Work, take_turns
from lowcal.experiments.workshop import Workshop
from lowcal.training.environment import gather_environment
from lowcal.training.process import keep_freed_memory

KINDS = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "graphed")}
BOUNDARIES = (0.5,)


def measure(settings: BenchSettings, kinds: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The figures as they are written."""
    settings = replace(settings, boundaries=BOUNDARIES, every=1)
    with (
        TemporaryDirectory() as cache,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        kernels(tf32=settings.tf32),
    ):
        shops = {kind: Workshop(replace(settings, step=kind), device) for kind in kinds}
        arms = {(kind, name): arm for kind, shop in shops.items() for name, arm in shop.arms().items()}
        works = {f"{kind} {name}": arm.work(shops[kind]) for (kind, name), arm in arms.items()}
        works["plain"] = Work(shops[kinds[0]].plain_step())
        times = take_turns(works, rounds=settings.rounds, warm_up=settings.warm_up, runs=settings.runs, device=device)
    plain = times["plain"].median
    rows = [
        {
            "step": kind,
            "method": arm.label,
            "boundary": arm.method.boundary,
            "step_ms": times[f"{kind} {name}"].median,
            "step_ms_q25": times[f"{kind} {name}"].q25,
            "step_ms_q75": times[f"{kind} {name}"].q75,
            "plain_over_step": plain / times[f"{kind} {name}"].median,
            "ready_s": arm.move_ms / 1000.0,
        }
        for (kind, name), arm in arms.items()
    ]
    return {
        "format": 1,
        "layers": len(shops[kinds[0]].order.layers),
        "plain_step_ms": plain,
        "rows": rows,
        "settings": asdict(settings),
        "environment": gather_environment(str(device)),
    }


def table(result: dict[str, Any]) -> str:
    """The table for the documentation, in Markdown."""
    lines = [
        "| step | method | boundary | step, ms (quartiles) | plain loop / step | seconds until it runs |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        step = f"{time(row['step_ms'])} ({time(row['step_ms_q25'])} to {time(row['step_ms_q75'])})"
        where = f"{row['boundary']} of {result['layers']}"
        ratio, ready = f"{row['plain_over_step']:.3f}×", f"{max(row['ready_s'], 0.0):.2f}"
        lines.append(f"| {row['step']} | {row['method']} | {where} | {step} | {ratio} | {ready} |")
    return "\n".join(lines) + "\n"


def write(name: str, device: torch.device, out: Path) -> None:
    """Measures one network of `NETWORKS`, prints the table and writes the files."""
    result = measure(NETWORKS[device.type][name], KINDS[device.type], device)
    (out / f"{name}-kinds.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}-kinds.md").write_text(table(result))
    print(table(result))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--network", default="resnet18-32", help="one of bench_networks.py's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = find_device(arguments.device)
    keep_freed_memory()  # as the command does
    write(arguments.network, device, arguments.out)


if __name__ == "__main__":
    main()
