"""A single run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.compare import advance, note_skipped, prepare
from lowcal.experiments.determinism import deterministic
from lowcal.experiments.folders import recipe_in, refuse_another_recipe, refuse_unwritable, refuse_used
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.threads import cpu_threads
from lowcal.training.record import RunFolder


def started_with(folder: Path) -> tuple[Recipe, str]:
    """The recipe and the method of the run in `folder`."""
    return recipe_in(folder), RunFolder.open(folder).read_identity()["method"]


def train(
    recipe: Recipe,
    method: str,
    folder: Path,
    *,
    resume: bool,
    data_dir: Path | None,
    device: torch.device,
    watcher: Watcher,
) -> dict[str, Any]:
    """Train one network by one method in `folder`, or with `resume` go on with the run that is there.

    Returns:
        What the run's `summary.json` holds.

    Raises:
        LowcalError: as `compare` does; with `resume` also if the run there is of another recipe or method, or its
            checkpoints cannot be used.
    """
    if resume:
        refuse_another_recipe(folder, recipe)
        started = started_with(folder)[1]
        if method != started:
            raise LowcalError(
                f"{folder} is a run of '{started}', not of '{method}'; leave --method out to go on with it"
            )
        summary = RunFolder(folder).read_summary()
        if summary is not None:
            watcher.note(f"{folder} is finished already")
            return summary
    elif RunFolder.holds_run(folder):
        raise LowcalError(f"{folder} holds a run already; go on with it by --resume or choose another --out")
    elif not RunFolder.is_half_made(folder):
        refuse_used(folder, "a run")
    refuse_unwritable(folder)
    data = load_data(recipe, data_dir)
    note_skipped(data, watcher)
    check(recipe, [method], data, device)
    arm = Arm(method, recipe.seed)
    with cpu_threads(recipe.threads), deterministic(recipe.deterministic):
        run = prepare(recipe, arm, folder, data=data, device=device, watcher=watcher)
        watcher.begin([arm], [run.finished], recipe.epochs)
        run.warm_up()
        while not run.done:
            advance(arm, run, watcher)
        return run.finish()
