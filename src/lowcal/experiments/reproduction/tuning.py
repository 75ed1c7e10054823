"""Searching the settings of cells that are tuned, by sweeps in the results folder."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lowcal.errors import LowcalError
from lowcal.experiments.arms import Watcher
from lowcal.experiments.reproduction.cells import Cell
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.sweep import Sweep, sweep
from lowcal.training.record import RunFolder


def unsearched(results: Results, cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose settings must be searched yet, each once."""
    return [cell for cell in dict.fromkeys(cells) if results.searches(cell) and results.found(cell) is None]


def plan_search(results: Results, cell: Cell) -> Sweep:
    """The sweep that finds a cell's settings on held-out training images, by error and FLOPs."""
    return Sweep(
        results.recipe(cell),
        cell.method,
        results.searches(cell),
        trials=results.scale.trials,
        objective="top1_error,flops",
    )


def search(results: Results, cells: Iterable[Cell], *, device: torch.device, watcher: Watcher) -> None:
    """Search the settings of each cell; a search that was broken off goes on where it stopped.

    Raises:
        LowcalError: Optuna or data is missing, the folder holds another sweep, or the search comes to nothing.
    """
    for cell in cells:
        plan, folder = plan_search(results, cell), results.search_folder(cell)
        keys = ", ".join(one.key for one in plan.searches)
        watcher.note(f"{cell.id}: {plan.trials} trials to find {keys}; in {folder}")
        sweep(plan, folder, data_dir=results.images(cell.recipe), device=device, watcher=watcher)
        found = results.found(cell)
        if found is None:
            raise LowcalError(
                f"{cell.id}: no trial of the search in {folder} came to a result; see sweep.md there, and give "
                f"settings by --set instead, as in --set {plan.searches[0].key}=..."
            )
        watcher.note(f"{cell.id}: {found}")


def epochs_left(results: Results, cell: Cell) -> int:
    """The epochs of a cell's search that are not trained yet."""
    plan, folder = plan_search(results, cell), results.search_folder(cell)
    done = sum(len(RunFolder(run).read_epochs()) for run in folder.glob("trial-*") if RunFolder.holds_run(run))
    return plan.trials * plan.seeds * plan.recipe.epochs - done
