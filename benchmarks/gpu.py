"""The figures of docs/performance.md on a CUDA GPU: step times, limits, layers; under 25 minutes.

    python benchmarks/gpu.py --out results/bench-cuda

Writes a JSON file and a picture for each network and kind of step, and prints the figures beside the targets. Networks
that are out of time or memory are named and left out.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from lowcal import LowcalError
from lowcal.console_bench import bench_text, targets_text
from lowcal.experiments.bench import bench
from lowcal.experiments.bench_plot import plot
from lowcal.experiments.bench_settings import BenchSettings

SECONDS = 22 * 60  # no further network is begun after this
FAST = {"precision": "bf16", "channels_last": True, "rounds": 15}
SETTINGS = {
    "resnet18-32": BenchSettings("resnet18", batch=64, image_size=32, **FAST),
    "resnet50-224": BenchSettings("resnet50", batch=64, image_size=224, classes=1000, **FAST),
    "vgg13-32": BenchSettings("vgg13", batch=64, image_size=32, **FAST),
    "resnet34-224": BenchSettings("resnet34", batch=64, image_size=224, classes=1000, **FAST),
    "mobilenet_v2-224": BenchSettings("mobilenet_v2", batch=64, image_size=224, classes=1000, epochs=150, **FAST),
    "resnet50-224-float32": BenchSettings("resnet50", batch=64, image_size=224, classes=1000, rounds=7),
}
LIMITS = {"boundary 0 / plain": 1.01, "sgd / plain": 1.00, "efficiency": 0.97, "every 4 / freeze": 1.05}
MEMORY = {"memory": 0.45}  # of resnet50
GRAPHED = {"sgd / plain": 0.80}  # of resnet18 on small images, where launching kernels takes most of an eager step


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files and pictures")
    parser.add_argument("--only", choices=SETTINGS, help="one network alone")
    parser.add_argument("--steps", default="eager,graphed,compiled", help="how steps are run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    torch.backends.cudnn.benchmark = True
    for name, settings in SETTINGS.items():
        if arguments.only not in (None, name):
            continue
        for step in arguments.steps.split(","):
            if perf_counter() - start > SECONDS:
                print(f"{name}, {step}: left out, the time is up")
                continue
            measure(f"{name}-{step}", replace(settings, step=step), arguments.out)
            print(f"{perf_counter() - start:.0f} s so far\n", flush=True)
            torch.cuda.empty_cache()


def measure(name: str, settings: BenchSettings, out: Path) -> None:
    """Measures one network with one kind of step."""
    try:
        result = bench(settings, torch.device("cuda"), print).as_dict()
    except (torch.cuda.OutOfMemoryError, LowcalError) as error:
        print(f"{name}: left out, {str(error).splitlines()[0]}")
        return
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out / f"{name}.svg")
    print(bench_text(result), "\n")
    limits = LIMITS | (MEMORY if settings.model == "resnet50" else {})
    print(targets_text(result, limits | (GRAPHED if name == "resnet18-32-graphed" else {})))


if __name__ == "__main__":
    main()
