"""A budget in the command: what it leads to is said before a run, and what was met after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lowcal.data import Dataset
from lowcal.experiments.arms import Watcher
from lowcal.experiments.assemble import build_run, memory_budget
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.recipe import Recipe
from lowcal.files import memory
from lowcal.methods import find_method
from lowcal.methods.boundary import Local
from lowcal.report.table import duration
from lowcal.schedule import reach
from lowcal.step_times import spread


def plan_budget(
    recipe: Recipe, methods: Sequence[str], data: Dataset, device: torch.device, watcher: Watcher, world: int = 1
) -> dict[str, dict[int, float]]:
    """Says what the budget leads to in each method with a boundary, before anything is written.

    Args:
        world: processes that share each mini-batch; this one measures with its shard.

    Returns:
        For a budget of time the seconds of a step at some boundaries, by method; they were measured on copies.

    Raises:
        LowcalError: the budget is out of reach.
    """
    times: dict[str, dict[int, float]] = {}
    methods = [method for method in methods if issubclass(find_method(method), Local)]
    if recipe.local.schedule.name != "budget" or not methods:
        return times
    own = replace(recipe, batch=replace(recipe.batch, size=-(-recipe.batch.size // world)))
    steps = recipe.epochs * -(-len(data.train) // recipe.batch.size)
    with TemporaryDirectory() as folder, cpu_threads(recipe.threads), kernels_of(recipe):
        data = data.to(device)
        for name in methods:
            run = build_run(own, method=name, folder=Path(folder) / name, data=data, device=device)
            method = run.method
            assert isinstance(method, Local)
            if recipe.local.schedule.memory is not None:
                least, plain = memory_budget(own, method, data)[1:]
                line = f"budget {recipe.local.schedule.memory:g} of the memory: {method.boundary} of "
                line += f"{len(method.layers)} layers before the boundary from the first step on"
                expected = f"a step takes {memory(least)} instead of {memory(plain)}"
            else:
                watcher.stage(f"{name}: measuring steps for the budget")
                for text in run.warm_up(1):
                    watcher.note(f"{name}: {text}")
                times[name] = run.step_times(spread(reach(recipe.local.schedule.build(), len(method.layers))))
                watcher.stage("")
                line, speedup = method.plan(times[name])
                whole = steps * times[name][0]
                expected = f"{duration(whole / speedup)} instead of {duration(whole)}"
            watcher.note(f"{name}: {line}, {expected}")
            method.detach()
    return times


def met(recipe: Recipe, run: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str | None:
    """A line on what a finished run met of its budget; None without one.

    Args:
        run: its summary.
        plain: the summary of sgd in the same comparison. None: a run is compared with its own steps at boundary 0.
    """
    settings = recipe.local.schedule
    if settings.name != "budget" or not issubclass(find_method(run["method"]), Local):
        return None
    if settings.memory is not None:
        if plain is None:
            return None
        part = run["peak_memory_bytes"] / plain["peak_memory_bytes"]
        return f"budget: asked {settings.memory:.2f} of sgd's memory, measured {part:.2f}"
    speedup = run["measured_speedup"] if plain is None else plain["seconds"] / run["seconds"]
    return f"budget: asked {settings.speedup:.2f}x, measured {speedup:.2f}x" + (
        " by its own step times" if plain is None else " of sgd's speed"
    )
