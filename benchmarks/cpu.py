"""The CPU figures of docs/performance.md: step times, limits, layers; under ten minutes on two quiet cores.

    nice -n -10 python benchmarks/cpu.py --out results/bench-cpu

Writes a JSON file and a picture for each network, and prints the figures beside the targets.
"""

import argparse
import json
from pathlib import Path

import torch

from lowcal.console_bench import bench_text, targets_text
from lowcal.experiments.bench import bench
from lowcal.experiments.bench_plot import plot
from lowcal.experiments.bench_settings import BenchSettings
from lowcal.training.allocator import keep_freed_memory

SETTINGS = {
    "resnet18-32": BenchSettings("resnet18", batch=64, image_size=32, rounds=7, warm_up=1),
    "resnet50-224": BenchSettings("resnet50", batch=8, image_size=224, rounds=7, warm_up=1),
}
LIMITS = {"boundary 0 / plain": 1.02, "sgd / plain": 1.00, "efficiency": 0.95, "every 4 / freeze": 1.08}
MEMORY = {"memory": 0.50}  # of resnet50


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files and pictures")
    parser.add_argument("--only", choices=SETTINGS, help="one network alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the command does
    for name, settings in SETTINGS.items():
        if arguments.only not in (None, name):
            continue
        result = bench(settings, torch.device("cpu"), print).as_dict()
        (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(result, arguments.out / f"{name}.svg")
        print(bench_text(result), "\n")
        print(targets_text(result, LIMITS | (MEMORY if settings.model == "resnet50" else {})), "\n")


if __name__ == "__main__":
    main()
