"""The figures of docs/performance.md, on a processor (about an hour on two quiet hyperthreads) or a CUDA GPU.

    nice -n -10 python benchmarks/performance.py --data-dir path/to/cifar10 --out results/bench-cpu
    python benchmarks/performance.py --device cuda --part steps --out results/bench-cuda

- steps: for each network the step times, limits, memory, moves and layers;
- kinds: the kinds of step beside one another, and the memory formats;
- small-runs, large-runs: whole runs beside what their steps predict (whole_run.py), at 32x32 and 224x224.

Prints the figures beside the targets. On a GPU no piece starts after 7.5 minutes of its part. Pieces that fail, or
have no time left, are named at the end.
"""

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch

import steps
import whole_run
from common import script
from lowcal.experiments.assemble import find_device
from lowcal.experiments.bench.setup import BenchSettings
from lowcal.training.process import keep_freed_memory

Pieces = dict[str, Callable[[Path], None]]

_SMALL = {"batch": 64, "image_size": 32}
_LARGE = {"image_size": 224}
_CPU = {"channels_last": True, "warm_up": 1}
_CUDA = {"precision": "bf16", "channels_last": True, "rounds": 9, "warm_up": 1}
_CUDA_LARGE = {"batch": 64, "classes": 1000, **_LARGE}
NETWORKS = {
    # On a CPU the rounds take about three minutes for each network.
    "cpu": {
        "resnet18-32": BenchSettings("resnet18", **_SMALL, rounds=7, **_CPU),
        "vgg13-32": BenchSettings("vgg13", **_SMALL, rounds=15, **_CPU),
        "resnet34-224": BenchSettings("resnet34", batch=8, **_LARGE, rounds=8, **_CPU),
        "resnet50-224": BenchSettings("resnet50", batch=8, **_LARGE, rounds=7, **_CPU),
        "mobilenet_v2-224": BenchSettings("mobilenet_v2", batch=8, epochs=150, **_LARGE, rounds=15, **_CPU),
    },
    "cuda": {
        "resnet18-32": BenchSettings("resnet18", **_SMALL, **_CUDA),
        "resnet50-224": BenchSettings("resnet50", **_CUDA_LARGE, **_CUDA),
        "vgg13-32": BenchSettings("vgg13", **_SMALL, **_CUDA),
        "resnet34-224": BenchSettings("resnet34", **_CUDA_LARGE, **_CUDA),
        "mobilenet_v2-224": BenchSettings("mobilenet_v2", epochs=150, **_CUDA_LARGE, **_CUDA),
    },
}
FLOAT32 = BenchSettings("resnet50", **_CUDA_LARGE, rounds=5, warm_up=1, step="graphed")
SECONDS = {"cpu": float("inf"), "cuda": 7.5 * 60}  # no further piece of a part starts after this
TARGETS = {
    "cpu": {"boundary 0 / plain": 1.02, "sgd / plain": 1.00, "efficiency": 0.95, "every 4 / freeze": 1.08},
    "cuda": {"boundary 0 / plain": 1.01, "sgd / plain": 1.00, "efficiency": 0.97, "every 4 / freeze": 1.05},
}
MEMORY = {"cpu": 0.50, "cuda": 0.45}  # of resnet50
MOVE = {"cpu": {"move / step": 1.0}, "cuda": {}}
GRAPHED = {"move, seconds": 2.0}
LAUNCHES = {"sgd / plain": 0.80}  # of resnet18 on small images, where launching kernels takes most of an eager step


def parts(device: torch.device, data_dir: Path | None = None) -> dict[str, Pieces]:
    """Return the pieces of each part by name; each is called with the folder to write to."""
    kind = device.type
    networks = NETWORKS[kind]
    if kind == "cuda":
        timed = {f"{name}-graphed": replace(settings, step="graphed") for name, settings in networks.items()}
        timed |= {f"{name}-eager": networks[name] for name in ("resnet18-32", "resnet50-224")}
        with_kinds = {name: networks[name] for name in ("resnet18-32", "resnet50-224")}
        with_formats = {name: replace(settings, precision="float32") for name, settings in with_kinds.items()}
    else:
        timed, with_kinds, with_formats = networks, {"resnet18-32": networks["resnet18-32"]}, networks
    kinds: Pieces = {f"{name}-kinds": partial(_kinds, name, each, device) for name, each in with_kinds.items()}
    if kind == "cuda":
        kinds["resnet50-224-float32-graphed"] = partial(_steps, "resnet50-224-float32-graphed", FLOAT32, device)
    kinds["memory-formats"] = partial(_formats, with_formats, device)
    runs = {f"whole-run-{name}": partial(whole_run.write, name, device, data_dir) for name in whole_run.SIZES[kind]}
    return {
        "steps": {name: partial(_steps, name, settings, device) for name, settings in timed.items()},
        "kinds": kinds,
        "small-runs": {name: piece for name, piece in runs.items() if "cifar" in name},
        "large-runs": {name: piece for name, piece in runs.items() if "cifar" not in name},
    }


def _steps(name: str, settings: BenchSettings, device: torch.device, out: Path) -> None:
    targets = TARGETS[device.type] | MOVE[device.type]
    if settings.model == "resnet50":
        targets["memory"] = MEMORY[device.type]
    if settings.step == "graphed":
        targets |= GRAPHED | (LAUNCHES if name.startswith("resnet18") else {})
    steps.write_steps(out / name, settings, device, targets)


def _kinds(name: str, settings: BenchSettings, device: torch.device, out: Path) -> None:
    steps.write_kinds(out / f"{name}-kinds", settings, steps.KINDS[device.type], device)


def _formats(networks: dict[str, BenchSettings], device: torch.device, out: Path) -> None:
    steps.write_formats(out / "memory-formats", networks, device)


def run(part: str, pieces: Pieces, out: Path, seconds: float) -> list[str]:
    """Run the pieces of a part; return those that failed or had no time left, with the reason."""
    left_out = []
    start = perf_counter()
    for name, piece in pieces.items():
        print(f"== {name}, at {perf_counter() - start:.0f} s", flush=True)
        if perf_counter() - start > seconds:
            left_out.append(f"{name}: the time is up")
            continue
        try:
            piece(out)
        except Exception as error:  # the other pieces still run
            traceback.print_exc()
            left_out.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"== {part}: {perf_counter() - start:.0f} s", flush=True)
    return left_out


def main() -> None:
    """Measure, print and write; exit with 1 if something was left out."""
    parser = script(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10; without it whole runs get synthetic images")
    parser.add_argument("--part", choices=("steps", "kinds", "small-runs", "large-runs"), help="default: all")
    parser.add_argument("--only", default="*", help="names of pieces, as in 'whole-run-*'")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    found = parts(device, arguments.data_dir)
    chosen = {
        part: {name: piece for name, piece in pieces.items() if fnmatch(name, arguments.only)}
        for part, pieces in found.items()
        if arguments.part in (None, part)
    }
    if not any(chosen.values()):
        parser.error(f"--only {arguments.only}: no such piece; there are {', '.join(chain(*found.values()))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the command does
    left_out = [
        line for part, pieces in chosen.items() for line in run(part, pieces, arguments.out, SECONDS[device.type])
    ]
    print("left out:", *left_out or ["nothing"], sep="\n  ")
    raise SystemExit(bool(left_out))


if __name__ == "__main__":
    main()
