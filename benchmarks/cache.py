"""How long an epoch behind a cached boundary takes, compared with the suffix alone, without a cache, and with SGD.

The recipe finetune-demo with three quarters of the layers frozen, on one CPU thread, without augmentation but for the
arm with views. All arms take a step each in turn, so that a drift of the machine affects all equally; an epoch is the
sum of its steps. Evaluation is not timed. Writes results/cache.json and .md.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from common import RESULTS, script, write
from lowcal.experiments.assemble import build_run, load_data
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.recipe_text import apply_settings, load_recipe
from lowcal.report.table import Column, Table
from lowcal.training.environment import gather_environment
from lowcal.training.run import Run

CPU = torch.device("cpu")
ARMS = {
    "sgd": ("sgd", []),
    "freeze": ("freeze", []),
    "cache=memory": ("freeze", ["cache=memory"]),
    "cache=memory, half": ("freeze", ["cache=memory", "cache.half=true"]),
    "cache=disk": ("freeze", ["cache=disk"]),
    "cache=memory, 2 views": ("freeze", ["cache=memory", "cache.views=2", "data.augment=true"]),
}
SUFFIX, FILL = "suffix alone", "filling"
Steps = list[Callable[[], object]]


def steps(run: Run) -> Steps:
    """The steps of an epoch."""
    run.model.train()
    return [partial(run._steps.step, *batch) for batch in run.train.raw_batches()]


def suffix_steps(run: Run) -> Steps:
    """The same for the layers behind the boundary alone: what crosses it is there already."""
    run.model.train()
    cached, cache = run._steps.step, run._steps.step.cache
    index = [rows[:, 0] for (rows,) in run.train.raw_batches()]
    return [partial(cached.step, *cache.network.gather(part), cache.labels[part]) for part in index]


def fill(run: Run, images: Any, size: int) -> Steps:
    """A new cache that records the network and computes all images."""
    run.model.train()
    return [lambda: run.method.cached(images).gather(torch.arange(size))]


def take_turns(arms: dict[str, Steps]) -> dict[str, float]:
    """The seconds of each arm's steps."""
    seconds = dict.fromkeys(arms, 0.0)
    for number, turn in enumerate(zip_longest(*arms.values())):
        pairs = [(name, step) for name, step in zip(arms, turn, strict=True) if step is not None]
        for name, step in pairs[::-1] if number % 2 else pairs:
            start = perf_counter()
            step()
            seconds[name] += perf_counter() - start
    return seconds


def summary(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """A row: the median and quartiles of an arm's seconds, and of its ratios to other arms within a round."""
    row: dict[str, Any] = {"arm": name, "n": len(times[name]), "seconds_all": times[name]}
    of: dict[str, list[float]] = {"seconds": times[name]}
    for other in (SUFFIX, "freeze", "sgd"):
        of[f"of {other}"] = [one / base for one, base in zip(times[name], times[other], strict=True)]
    for key, values in of.items():
        low, middle, high = statistics.quantiles(values, n=4)
        row |= {key: middle, f"{key}_q25": low, f"{key}_q75": high}
    return row


def spread(name: str, digits: int) -> Callable[[Any], str]:
    """A cell with a median and its quartiles."""
    return lambda row: f"{row[name]:.{digits}f} ({row[f'{name}_q25']:.{digits}f} to {row[f'{name}_q75']:.{digits}f})"


def main() -> None:
    """Measure, print, write."""
    parser = script(__doc__, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    settings = ["model.frozen=0.75", "cache=none", "data.augment=false", "step=eager"]
    recipe = apply_settings(load_recipe("finetune-demo"), settings)
    plain, augmented = (load_data(apply_settings(recipe, [f"data.augment={on}"]), None) for on in ("false", "true"))
    with tempfile.TemporaryDirectory() as folder, cpu_threads(1), kernels_of(recipe):
        runs = {}
        for name, (method, settings) in ARMS.items():
            own = apply_settings(recipe, settings)
            data = augmented if own.data.augment else plain
            runs[name] = build_run(own, method=method, folder=Path(folder) / name, data=data, device=CPU)
        memory = runs["cache=memory"]
        images = memory.train.sample_input(memory.train.count)
        times: dict[str, list[float]] = {name: [] for name in (*runs, SUFFIX, FILL)}
        for number in range(arguments.rounds + 1):
            arms = {name: steps(run) for name, run in runs.items()}
            if number == 0:  # fills the caches and warms up
                take_turns(arms)
                continue
            arms[SUFFIX] = suffix_steps(memory)
            arms[FILL] = fill(runs["freeze"], images, recipe.batch.size)
            seconds = take_turns(arms)
            for name, found in times.items():
                found.append(seconds[name])
            print(number, {name: round(found, 2) for name, found in seconds.items()}, flush=True)
        network = memory._steps.step.cache.network
        stored = memory.train.count * sum(layout.bytes_per_image for layout in network._layouts)
    rows = [summary(name, times) for name in times]
    columns = (
        Column("arm", "an epoch of"),
        Column("seconds", "seconds", spread("seconds", 2)),
        Column(f"of {SUFFIX}", "of the suffix alone", spread(f"of {SUFFIX}", 3)),
        Column("of freeze", "of freeze without a cache", spread("of freeze", 2)),
        Column("of sgd", "of SGD", spread("of sgd", 2)),
    )
    facts = {"recipe": recipe.label, "boundary": memory.method.boundary, "layers": len(memory.method.layers)}
    facts |= {"images": memory.train.count, "stored_bytes": stored, "environment": gather_environment("cpu")}
    write(arguments.out / "cache", Table(columns, rows), **facts)


if __name__ == "__main__":
    main()
