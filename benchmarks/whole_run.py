"""Whole runs of the paper's networks: its speed-up, the measured one, what the steps predict, what can be had at most.

    python benchmarks/whole_run.py --only resnet18-cifar10 --data-dir path/to/cifar10 --out results/bench-cpu

Trains sgd, local and freeze in turn by the published recipe, shortened as `SIZES` says; then times a step at each
boundary that the runs were at, in turn too, with its mini-batch made in it as in a run. A run's speed-up over sgd is
put beside the one that those step times give for its path. What the published schedule gives at most is that of its
fastest path over all of the recipe's epochs: from the same step times, and from the FLOPs of the network at its
published width, in which there is no noise.

Networks for large images are trained on synthetic ones; those for CIFAR-10 too, if no folder is given. About eight
minutes for each network on two quiet hyperthreads. Writes OUT/whole-run-RECIPE.json, and OUT/whole-runs.md, a table of
all the networks that are there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common import METHOD, Log, script
from lowcal.data import Loader, make_loader
from lowcal.discovery import trace
from lowcal.experiments.assemble import load_data
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.bench.run import fastest_path, flops_speedup, predicted_speedup
from lowcal.experiments.bench.setup import BenchSettings, BenchSetup, TimedMethod, forward_flops
from lowcal.experiments.bench.timing import time_in_turn
from lowcal.experiments.compare import compare
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, load_recipe
from lowcal.experiments.reproduce.paper import published
from lowcal.layers import recurring_block
from lowcal.models import build_model
from lowcal.report.table import Column, Table
from lowcal.training.environment import gather_environment
from lowcal.training.process import keep_freed_memory

METHODS = ("local", "freeze")
LEAST = 0.98  # measured over predicted speed-up
FORMAT = 2
ORDER = (  # the paper's
    "resnet18-cifar10",
    "vgg13-cifar10",
    "resnet34-imagenet",
    "resnet50-imagenet",
    "mobilenet_v2-imagenet",
)
ROUNDS, WARM_UP = 10, 2  # of step times


@dataclass(frozen=True)
class Size:
    """What a published recipe is shortened to.

    Attributes:
        batch: images in a mini-batch.
        steps: mini-batches in an epoch.
        epochs: into which the whole schedule of the learning rate is compressed.
        test_images: that are evaluated after each.
        classes: of synthetic images.
        width: channels of the network's first stage; None: as published.
    """

    batch: int
    steps: int
    epochs: int = 18
    test_images: int = 16
    classes: int = 10
    width: int | None = None


SIZES = {
    "resnet18-cifar10": Size(batch=64, steps=24, test_images=64, width=32),
    "vgg13-cifar10": Size(batch=64, steps=48, test_images=64, width=32),
    "resnet34-imagenet": Size(batch=8, steps=24, width=32),
    "resnet50-imagenet": Size(batch=8, steps=16, width=32),
    "mobilenet_v2-imagenet": Size(batch=8, steps=22),
}
WAYS = ("step=eager", "channels_last=true")
CPU = torch.device("cpu")


def shortened(recipe: Recipe, size: Size, *, synthetic: bool) -> list[str]:
    """The settings that make of the published `recipe` one of `size`."""
    settings = [
        f"epochs={size.epochs}",
        f"lr_schedule.epochs={recipe.epochs}",
        f"batch={size.batch}",
        f"data.train_images={size.batch * size.steps}",
        f"data.test_images={size.test_images}",
        *WAYS,
    ]
    if size.width is not None:
        settings.append(f"model.width={size.width}")
    if synthetic:
        settings += ["data.name=synthetic", f"data.image_size={image_size(recipe)}", f"data.classes={size.classes}"]
    return settings


def image_size(recipe: Recipe) -> int:
    """Height and width of the published recipe's images."""
    return 224 if recipe.data.name == "imagenet" else 32


def measure(name: str, size: Size, data_dir: Path | None) -> dict[str, Any]:
    """Trains, times steps and predicts; the figures as they are written.

    Args:
        name: the published recipe's.
        data_dir: where CIFAR-10 is; None: synthetic images.
    """
    whole = load_recipe(name)
    is_synthetic = data_dir is None or whole.data.name == "imagenet"
    settings = shortened(whole, size, synthetic=is_synthetic)
    recipe = apply_settings(whole, settings)
    data_dir = None if is_synthetic else data_dir
    runs = train(recipe, data_dir)
    with cpu_threads(recipe.threads), kernels_of(recipe):
        bench = bench_settings(recipe, size, image_size(whole), runs["sgd"][0]["step"])
        setup = BenchSetup(bench, CPU, training_images(recipe, data_dir))
        fastest = fastest_published_path(whole, setup)
        on_it = {fastest[len(fastest) // 2], fastest[-1]}  # whether the runs came there or not
        visited = {record["boundary"] for record in chain(*runs.values())}
        times = step_times(setup, sorted((visited | on_it) - {0}))
        environment = gather_environment("cpu")
    return {
        "format": FORMAT,
        "recipe": name,
        "model": recipe.model.name,
        "width": size.width,
        "images": "synthetic" if is_synthetic else recipe.data.name,
        "image_size": image_size(whole),
        "settings": settings,
        "layers": len(setup.order.layers),
        "rows": [row(name, method, runs, times, setup, fastest) for method in METHODS],
        "fastest_published_path": fastest,
        "runs": {
            method: {key: [record[key] for record in records] for key in ("boundary", "seconds", "step")}
            for method, records in runs.items()
        },
        "step_times": list(times.values()),
        "environment": environment,
    }


def train(recipe: Recipe, data_dir: Path | None) -> dict[str, list[dict[str, Any]]]:
    """The epochs' records of sgd and of `METHODS`, trained in turn."""
    methods = ("sgd", *METHODS)
    with TemporaryDirectory() as name:
        out = Path(name) / "runs"
        compare(recipe, methods, 1, out, data_dir=data_dir, device=CPU, watcher=Log())
        logs = {method: out / f"{method}-seed{recipe.seed}" / "epochs.jsonl" for method in methods}
        return {method: [json.loads(line) for line in log.read_text().splitlines()] for method, log in logs.items()}


def bench_settings(recipe: Recipe, size: Size, pixels: int, step: str) -> BenchSettings:
    """The network and images of `recipe`, to time steps of the kind that its runs had."""
    return BenchSettings(
        recipe.model.name,
        batch=size.batch,
        image_size=pixels,
        classes=size.classes,
        width=size.width,
        precision=recipe.precision,
        tf32=recipe.tf32,
        channels_last=recipe.channels_last,
        step=step,
        epochs=size.epochs,
    )


def training_images(recipe: Recipe, data_dir: Path | None) -> Loader:
    """The mini-batches of a run, which its steps make themselves."""
    return make_loader(
        load_data(recipe, data_dir),
        training=True,
        batch=recipe.batch.size,
        device=CPU,
        seed=recipe.seed,
        channels_last=recipe.channels_last,
    )


def fastest_published_path(whole: Recipe, setup: BenchSetup) -> list[int]:
    """The boundary in each epoch of the published run if Algorithm 1 always moves as soon as it may."""
    layers = setup.order.layers
    return fastest_path(
        whole.local.schedule.build(),
        layers=len(layers),
        block=recurring_block(setup.model, layers),
        epochs=whole.epochs,
    )


def step_times(setup: BenchSetup, boundaries: Sequence[int]) -> dict[tuple[str, int], dict[str, Any]]:
    """The step of sgd, and of each of `METHODS` at 0 and at `boundaries`, in ms; `ready_ms` is what the move took."""
    places = [("sgd", 0), ("local", 0), *((method, boundary) for boundary in boundaries for method in METHODS)]
    methods = {place: TimedMethod(setup, *place) for place in places}
    works = {f"{method} {boundary}": timed.work() for (method, boundary), timed in methods.items()}
    taken = time_in_turn(works, rounds=ROUNDS, warm_up=WARM_UP, device=setup.device)
    times = {}
    for (method, boundary), timed in methods.items():
        timing = taken[f"{method} {boundary}"].fields("step_ms")
        times[method, boundary] = {"method": method, "boundary": boundary, **timing, "ready_ms": timed.move_ms}
    return times


def row(
    name: str,
    method: str,
    runs: dict[str, list[dict[str, Any]]],
    times: dict[tuple[str, int], dict[str, Any]],
    setup: BenchSetup,
    fastest: Sequence[int],
) -> dict[str, Any]:
    """What is said of one method: the speed-ups of the paper, measured, predicted and at most."""
    path = [record["boundary"] for record in runs[method]]
    seconds = {each: sum(record["seconds"] for record in runs[each]) for each in ("sgd", method)}
    own = {boundary: time for (each, boundary), time in times.items() if each == method}
    own[0] = times["local", 0]  # there the methods are one
    known = {
        "sgd_ms": times["sgd", 0]["step_ms"],
        "step_ms": {boundary: time["step_ms"] for boundary, time in own.items()},
        "forward_flops": setup.forward_flops,
    }
    measured, predicted = seconds["sgd"] / seconds[method], predicted_speedup(method, path, **known)
    return {
        "method": method,
        "last_boundary": path[-1],
        "paper": published(name, method)[1],
        "measured": measured,
        "predicted": predicted,
        "ratio": measured / predicted,
        "moves_share": sum(own[boundary]["ready_ms"] for boundary in set(path) - {0}) / 1000.0 / seconds[method],
        "most_by_steps": predicted_speedup(method, fastest, **known),
        "most_by_flops": flops_speedup(method, fastest, published_flops(setup.settings)),
    }


def published_flops(settings: BenchSettings) -> list[float]:
    """FLOPs of each layer's forward pass in the network of published width."""
    model = build_model(settings.model, classes=settings.classes)
    images = torch.zeros(1, 3, settings.image_size, settings.image_size)
    return forward_flops(model, images, trace(model, images).layers)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Return a row for each network and method."""
    columns = (
        Column("network", "network, images", _network, left=True),
        METHOD,
        Column("last_boundary", "last boundary", lambda row: f"{row['last_boundary']} of {row['layers']}"),
        Column("paper", "paper", ".2f", "×"),
        Column("measured", "measured", ".2f", "×"),
        Column("predicted", "predicted for its path", ".2f", "×"),
        Column("ratio", "measured / predicted", ".3f"),
        Column("most_by_steps", "published schedule at most: by step times", ".2f", "×"),
        Column("most_by_flops", "by FLOPs", ".2f", "×"),
    )
    return Table(columns, [{**result, **found} for result in results for found in result["rows"]])


def _network(row: Mapping[str, Any]) -> str:
    width = f" of width {row['width']}" if row["width"] else ""
    return f"{row['model']}{width}, {row['images']} {row['image_size']}x{row['image_size']}"


def write_table(folder: Path) -> Table:
    """Write the table of the results in `folder`, without those of an older format; return it."""
    results = [json.loads(file.read_text()) for file in folder.glob("whole-run-*.json")]
    found = table(sorted((r for r in results if r["format"] == FORMAT), key=lambda r: ORDER.index(r["recipe"])))
    found.write(folder / "whole-runs", ("md",))
    return found


def write(name: str, data_dir: Path | None, out: Path) -> None:
    """Measure one network of `SIZES`, and write its figures and the table of all that are in `out`."""
    result = measure(name, SIZES[name], data_dir)
    (out / f"whole-run-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(write_table(out).markdown())
    for found in result["rows"]:
        verdict = "met" if found["ratio"] >= LEAST else "missed"
        print(
            f"{name}, {found['method']}: measured / predicted {found['ratio']:.3f}, >= {LEAST} {verdict}; "
            f"moves took {found['moves_share']:.1%} of the run"
        )


def main() -> None:
    """Train, measure, print and write."""
    parser = script(__doc__)
    parser.add_argument("--only", choices=SIZES, help="one network alone")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10; without it these networks too get synthetic images")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in [arguments.only] if arguments.only else SIZES:
        write(name, arguments.data_dir, arguments.out)


if __name__ == "__main__":
    main()
