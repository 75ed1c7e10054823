"""The networks of docs/performance.md and their settings on each kind of device; how one is measured."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from bench_table import table
from lowcal.console_bench import bench_text, targets_text
from lowcal.experiments.bench import bench
from lowcal.experiments.bench_plot import plot
from lowcal.experiments.bench_settings import BenchSettings

_SMALL = {"batch": 64, "image_size": 32}
_LARGE = {"image_size": 224}
_CPU = {"channels_last": True, "warm_up": 1}
_CUDA = {"precision": "bf16", "channels_last": True, "rounds": 9, "warm_up": 1}
_CUDA_LARGE = {"batch": 64, "classes": 1000, **_LARGE}

NETWORKS = {
    # On CPU the rounds are as many as take about three minutes.
    "cpu": {
        "resnet18-32": BenchSettings("resnet18", **_SMALL, rounds=7, **_CPU),
        "vgg13-32": BenchSettings("vgg13", **_SMALL, rounds=15, **_CPU),
        "resnet34-224": BenchSettings("resnet34", batch=8, **_LARGE, rounds=8, **_CPU),
        "resnet50-224": BenchSettings("resnet50", batch=8, **_LARGE, rounds=7, **_CPU),
        "mobilenet_v2-224": BenchSettings("mobilenet_v2", batch=8, epochs=150, **_LARGE, rounds=15, **_CPU),
    },
    "cuda": {
        "resnet18-32": BenchSettings("resnet18", **_SMALL, **_CUDA),
        "vgg13-32": BenchSettings("vgg13", **_SMALL, **_CUDA),
        "resnet34-224": BenchSettings("resnet34", **_CUDA_LARGE, **_CUDA),
        "resnet50-224": BenchSettings("resnet50", **_CUDA_LARGE, **_CUDA),
        "mobilenet_v2-224": BenchSettings("mobilenet_v2", epochs=150, **_CUDA_LARGE, **_CUDA),
        "resnet50-224-float32": BenchSettings("resnet50", **_CUDA_LARGE, rounds=5, warm_up=1),
    },
}


def measure(name: str, settings: BenchSettings, device: torch.device, out: Path, targets: Mapping[str, float]) -> None:
    """Measures one network, prints the figures beside the targets, writes OUT/NAME.json, .md and .svg."""
    result = bench(settings, device, print).as_dict()
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(result))
    plot(result, out / f"{name}.svg")
    print(bench_text(result), "\n")
    print(targets_text(result, targets), "\n")
