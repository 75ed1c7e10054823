"""The figures of docs/performance.md on a CUDA GPU, in four parts, none of which begins a piece after 7.5 minutes.

    python benchmarks/gpu.py --part steps --out results/bench-cuda

- steps: of each network the step times, limits, memory, moves and layers (bench_networks.py);
- kinds: the kinds of step beside one another (step_kinds.py), and float32;
- small-runs, large-runs: whole runs beside what their steps predict (whole_run.py), at 32x32 and 224x224.

Prints the figures beside the targets. Pieces that fail, or for which the time is up, are named and left out.
"""

import argparse
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

import memory_formats
import step_kinds
import whole_run
from bench_networks import NETWORKS, measure

DEVICE = torch.device("cuda")
SECONDS = 7.5 * 60  # no further piece of a part is begun after this
TARGETS = {"boundary 0 / plain": 1.01, "sgd / plain": 1.00, "efficiency": 0.97, "every 4 / freeze": 1.05}
MEMORY = {"memory": 0.45}  # of resnet50
GRAPHED = {"move, seconds": 2.0}
LAUNCHES = {"sgd / plain": 0.80}  # of resnet18 on small images, where launching kernels takes most of an eager step

STEPS = (
    ("resnet18-32", "graphed"),
    ("resnet50-224", "graphed"),
    ("vgg13-32", "graphed"),
    ("resnet34-224", "graphed"),
    ("mobilenet_v2-224", "graphed"),
    ("resnet18-32", "eager"),
    ("resnet50-224", "eager"),
)
KINDS = ("resnet18-32", "resnet50-224")
FLOAT32 = ("resnet50-224-float32", "graphed")


def parts() -> dict[str, dict[str, Callable[[Path], None]]]:
    """The pieces of each part by name; each is given the folder to write to."""
    steps = {f"{name}-{step}": partial(time_steps, name, step) for name, step in STEPS}
    kinds = {f"{name}-kinds": partial(step_kinds.write, name, DEVICE) for name in KINDS}
    kinds["-".join(FLOAT32)] = partial(time_steps, *FLOAT32)
    single = {name: replace(NETWORKS["cuda"][name], precision="float32") for name in KINDS}
    kinds["memory-formats"] = partial(memory_formats.write, single, DEVICE)
    runs = {f"whole-run-{name}": partial(whole_run.write, name, DEVICE, None) for name in whole_run.SIZES["cuda"]}
    small = {name: piece for name, piece in runs.items() if "cifar" in name}
    large = {name: piece for name, piece in runs.items() if name not in small}
    return {"steps": steps, "kinds": kinds, "small-runs": small, "large-runs": large}


def time_steps(name: str, step: str, out: Path) -> None:
    """Measures one network with one kind of step."""
    targets = TARGETS | (MEMORY if name.startswith("resnet50") else {}) | (GRAPHED if step == "graphed" else {})
    if (name, step) == ("resnet18-32", "graphed"):
        targets |= LAUNCHES
    measure(f"{name}-{step}", replace(NETWORKS["cuda"][name], step=step), DEVICE, out, targets)


def main() -> None:
    """Measures, prints and writes; ends with 1 if something failed."""
    found = parts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--part", choices=found, help="default: all, one after another")
    parser.add_argument("--only", default="*", help="names of pieces, as in 'resnet18*'")
    arguments = parser.parse_args()
    chosen = {
        part: {name: piece for name, piece in pieces.items() if fnmatch(name, arguments.only)}
        for part, pieces in found.items()
        if arguments.part in (None, part)
    }
    if not any(chosen.values()):
        parser.error(f"--only {arguments.only}: no such piece; there are {', '.join(chain(*found.values()))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    left_out = []
    for part, pieces in chosen.items():
        start = perf_counter()
        for name, piece in pieces.items():
            print(f"== {name}, at {perf_counter() - start:.0f} s", flush=True)
            if perf_counter() - start > SECONDS:
                left_out.append(f"{name}: the time is up")
                continue
            try:
                piece(arguments.out)
            except Exception as error:  # the other pieces are worth having
                traceback.print_exc()
                left_out.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            gc.collect()
            torch.cuda.empty_cache()
        print(f"== {part}: {perf_counter() - start:.0f} s", flush=True)
    print("left out:", *left_out or ["nothing"], sep="\n  ")
    raise SystemExit(bool(left_out))


if __name__ == "__main__":
    main()
