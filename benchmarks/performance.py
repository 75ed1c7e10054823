"""The figures of docs/performance.md on a processor: about an hour on two quiet hyperthreads (on a GPU: gpu.py).

    nice -n -10 python benchmarks/performance.py --data-dir path/to/cifar10 --out results/bench-cpu

- steps: for each network the step times, limits, memory, moves and layers;
- kinds: the kinds of step, and the memory formats;
- small-runs, large-runs: whole runs and what their steps predict (whole_run.py), at 32x32 and 224x224.

Prints the figures with the targets. Pieces that fail are named at the end.
"""

import gc
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch

import steps
import whole_run
from common import script
from lowcal.experiments.bench.setup import BenchSettings
from lowcal.files import first_line
from lowcal.training.process import keep_freed_memory

Pieces = dict[str, Callable[[Path], None]]

_SMALL = {"batch": 64, "image_size": 32, "channels_last": True, "warm_up": 1}
_LARGE = {"batch": 8, "image_size": 224, "channels_last": True, "warm_up": 1}
NETWORKS = {  # the rounds take about three minutes for each network
    "resnet18-32": BenchSettings("resnet18", **_SMALL, rounds=7),
    "vgg13-32": BenchSettings("vgg13", **_SMALL, rounds=15),
    "resnet34-224": BenchSettings("resnet34", **_LARGE, rounds=8),
    "resnet50-224": BenchSettings("resnet50", **_LARGE, rounds=7),
    "mobilenet_v2-224": BenchSettings("mobilenet_v2", **_LARGE, epochs=150, rounds=15),
}
TARGETS = {
    "boundary 0 / plain": 1.02,
    "sgd / plain": 1.00,
    "efficiency": 0.95,
    "every 4 / freeze": 1.08,
    "move / step": 1.0,
}
MEMORY = {"memory": 0.50}  # of resnet50
KINDS = ("eager", "compiled")
CPU = torch.device("cpu")


def parts(data_dir: Path | None = None) -> dict[str, Pieces]:
    """Return the pieces of each part by name; each is called with the folder to write to."""
    runs = {f"whole-run-{name}": partial(whole_run.write, name, data_dir) for name in whole_run.SIZES}
    return {
        "steps": {name: partial(_steps, name, settings) for name, settings in NETWORKS.items()},
        "kinds": {
            "resnet18-32-kinds": partial(_kinds, "resnet18-32", NETWORKS["resnet18-32"]),
            "memory-formats": partial(_formats, NETWORKS),
        },
        "small-runs": {name: piece for name, piece in runs.items() if "cifar" in name},
        "large-runs": {name: piece for name, piece in runs.items() if "cifar" not in name},
    }


def _steps(name: str, settings: BenchSettings, out: Path) -> None:
    steps.write_steps(out / name, settings, CPU, TARGETS | (MEMORY if settings.model == "resnet50" else {}))


def _kinds(name: str, settings: BenchSettings, out: Path) -> None:
    steps.write_kinds(out / f"{name}-kinds", settings, KINDS, CPU)


def _formats(networks: dict[str, BenchSettings], out: Path) -> None:
    steps.write_formats(out / "memory-formats", networks, CPU)


def run(part: str, pieces: Pieces, out: Path) -> list[str]:
    """Run the pieces of a part; return those that failed, with the reason."""
    failed = []
    start = perf_counter()
    for name, piece in pieces.items():
        print(f"== {name}, at {perf_counter() - start:.0f} s", flush=True)
        try:
            piece(out)
        except Exception as error:  # the other pieces still run
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {first_line(error)}")
        gc.collect()
    print(f"== {part}: {perf_counter() - start:.0f} s", flush=True)
    return failed


def main() -> None:
    """Measure, print and write; exit with 1 if something failed."""
    parser = script(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10; without it whole runs get synthetic images")
    parser.add_argument("--part", choices=("steps", "kinds", "small-runs", "large-runs"), help="default: all")
    parser.add_argument("--only", default="*", help="names of pieces, as in 'whole-run-*'")
    arguments = parser.parse_args()
    found = parts(arguments.data_dir)
    chosen = {
        part: {name: piece for name, piece in pieces.items() if fnmatch(name, arguments.only)}
        for part, pieces in found.items()
        if arguments.part in (None, part)
    }
    if not any(chosen.values()):
        parser.error(f"--only {arguments.only}: no such piece; there are {', '.join(chain(*found.values()))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the command does
    failed = [line for part, pieces in chosen.items() for line in run(part, pieces, arguments.out)]
    print("failed:", *failed or ["nothing"], sep="\n  ")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
