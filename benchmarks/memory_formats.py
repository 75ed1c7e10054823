"""Steps with the channels first and last in memory, in turn: `memory_formats.py --device cpu --out results/bench-cpu`.

Of each network the steps of sgd, local and freeze, the latter two at half of its layers. Writes
OUT/memory-formats.json and .md.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench_networks import NETWORKS
from bench_table import time
from lowcal.experiments.assemble import find_device
from lowcal.experiments.backends import kernels
from lowcal.experiments.bench_settings import BenchSettings
from lowcal.experiments.timing import take_turns
from lowcal.experiments.workshop import Workshop
from lowcal.training.environment import gather_environment
from lowcal.training.process import keep_freed_memory

ROUNDS = 7
FORMATS = {"first": False, "last": True}  # where the channels are


def measure(networks: Mapping[str, BenchSettings], device: torch.device) -> dict[str, Any]:
    """The figures as they are written."""
    rows = [row for name, settings in networks.items() for row in measure_one(name, settings, device)]
    return {"format": 1, "rows": rows, "environment": gather_environment(str(device))}


def measure_one(name: str, settings: BenchSettings, device: torch.device) -> list[dict[str, Any]]:
    """The rows of one network."""
    settings = replace(settings, boundaries=(0.5,), every=1)
    with kernels(tf32=settings.tf32):
        shops = {key: Workshop(replace(settings, channels_last=last), device) for key, last in FORMATS.items()}
        arms = {key: shop.arms() for key, shop in shops.items()}
        works = {f"{key} {label}": arm.work(shops[key]) for key in FORMATS for label, arm in arms[key].items()}
        times = take_turns(works, rounds=ROUNDS, warm_up=settings.warm_up, device=device)
    return [
        {
            "network": name,
            "method": arm.label,
            "boundary": arm.method.boundary,
            "layers": len(shops["first"].order.layers),
            **{key: asdict(times[f"{key} {label}"]) for key in FORMATS},
            "first_over_last": times[f"first {label}"].median / times[f"last {label}"].median,
        }
        for label, arm in arms["first"].items()
    ]


def table(result: dict[str, Any]) -> str:
    """The table for the documentation, in Markdown."""
    lines = [
        "| network | method | boundary | channels first, ms (quartiles) | last, ms (quartiles) | first / last |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        first, last = (
            f"{time(row[key]['median'])} ({time(row[key]['q25'])} to {time(row[key]['q75'])})" for key in FORMATS
        )
        where = f"{row['boundary']} of {row['layers']}"
        lines.append(
            f"| {row['network']} | {row['method']} | {where} | {first} | {last} | {row['first_over_last']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write(networks: Mapping[str, BenchSettings], device: torch.device, out: Path) -> None:
    """Measures `networks`, prints the table and writes the files."""
    result = measure(networks, device)
    (out / "memory-formats.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "memory-formats.md").write_text(table(result))
    print(table(result))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = find_device(arguments.device)
    keep_freed_memory()  # as the command does
    write(NETWORKS[device.type], device, arguments.out)


if __name__ == "__main__":
    main()
