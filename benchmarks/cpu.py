"""The figures of docs/performance.md on a processor, about an hour on two quiet hyperthreads.

    nice -n -10 python benchmarks/cpu.py --data-dir path/to/cifar10 --out results/bench-cpu

The steps of each network beside a plain loop, their limits and layers (bench_networks.py); both memory formats in turn
(memory_formats.py); the kinds of step (step_kinds.py); whole runs beside what their steps predict (whole_run.py, on
synthetic images if there is no folder). Prints the figures beside the targets.
"""

import argparse
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

import memory_formats
import step_kinds
import whole_run
from bench_networks import NETWORKS, measure
from lowcal.training.process import keep_freed_memory

DEVICE = torch.device("cpu")
TARGETS = {
    "boundary 0 / plain": 1.02,
    "sgd / plain": 1.00,
    "efficiency": 0.95,
    "every 4 / freeze": 1.08,
    "move / step": 1.0,
}
MEMORY = {"memory": 0.50}  # of resnet50
KINDS = "resnet18-32"


def pieces(data_dir: Path | None) -> dict[str, Callable[[Path], None]]:
    """What is measured, by name; each piece is given the folder to write to."""
    networks = NETWORKS[DEVICE.type]
    return {
        **{name: partial(time_steps, name) for name in networks},
        "memory-formats": partial(memory_formats.write, networks, DEVICE),
        f"{KINDS}-kinds": partial(step_kinds.write, KINDS, DEVICE),
        **{f"whole-run-{name}": partial(whole_run.write, name, DEVICE, data_dir) for name in whole_run.SIZES["cpu"]},
    }


def time_steps(name: str, out: Path) -> None:
    """Measures the steps of one network."""
    settings = NETWORKS[DEVICE.type][name]
    targets = TARGETS | (MEMORY if settings.model == "resnet50" else {})
    measure(name, settings, DEVICE, out, targets)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--only", default="*", help="names of pieces, as in 'whole-run-*'")
    arguments = parser.parse_args()
    found = {name: piece for name, piece in pieces(arguments.data_dir).items() if fnmatch(name, arguments.only)}
    if not found:
        parser.error(f"no piece is called {arguments.only!r}; there are {', '.join(pieces(None))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the command does
    for name, piece in found.items():
        print(f"== {name}", flush=True)
        piece(arguments.out)


if __name__ == "__main__":
    main()
