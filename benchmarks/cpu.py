"""The CPU figures of docs/performance.md: step times, limits, layers; about three minutes for each network.

    nice -n -10 python benchmarks/cpu.py --out results/bench-cpu

Writes a JSON file, a table and a picture for each network, and prints the figures beside the targets.
"""

import argparse
from pathlib import Path

import torch

from bench_networks import NETWORKS, measure
from lowcal.training.allocator import keep_freed_memory

SETTINGS = NETWORKS["cpu"]
TARGETS = {
    "boundary 0 / plain": 1.02,
    "sgd / plain": 1.00,
    "efficiency": 0.95,
    "every 4 / freeze": 1.08,
    "move / step": 1.0,
}
MEMORY = {"memory": 0.50}  # of resnet50


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--only", choices=SETTINGS, help="one network alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    keep_freed_memory()  # as the command does
    for name in [arguments.only] if arguments.only else SETTINGS:
        settings = SETTINGS[name]
        targets = TARGETS | (MEMORY if settings.model == "resnet50" else {})
        measure(name, settings, device, arguments.out, targets)


if __name__ == "__main__":
    main()
