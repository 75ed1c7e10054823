"""A run that goes on under changed settings: for more epochs, or with a lower rate after it has diverged."""

from __future__ import annotations

from pathlib import Path

from lowcal.errors import LowcalError
from lowcal.experiments.folders import recipe_in, refuse_another_recipe
from lowcal.experiments.recipe import Recipe, lr_at
from lowcal.experiments.recipe_text import differences, dump_recipe, parse_recipe
from lowcal.layers import recurring_block
from lowcal.methods.boundary import Local
from lowcal.schedule import interval
from lowcal.training.record import RunFolder
from lowcal.training.trainer import Run

FOR_MORE_EPOCHS = frozenset({"epochs", "lr_schedule.epochs"})
AFTER_DIVERGING = frozenset({"optimizer.lr", "local.lr", "guard.max_skips"})
EXTEND = "--resume --extend --set epochs=N"


def refuse_changes(folder: Path, recipe: Recipe, *, extend: bool) -> None:
    """Refuse to go on with the run in `folder` under `recipe` if more differs than may.

    With `extend` the number of epochs may grow. In a run that has diverged, what may be the reason can be changed.
    """
    files, there = RunFolder.open(folder), recipe_in(folder)
    if recipe.epochs != there.epochs and not extend:
        raise LowcalError(
            f"{folder} was started with another recipe: epochs ({there.epochs} there, {recipe.epochs} here); "
            f"{EXTEND} goes on for more epochs, or choose another --out"
        )
    is_finished = files.read_summary() is not None
    if extend and (recipe.epochs < there.epochs or (recipe.epochs == there.epochs and is_finished)):
        raise LowcalError(
            f"--extend: the run in {folder} has {there.epochs} epochs; give a larger number of all its epochs, "
            f"--set epochs={2 * there.epochs} say"
        )
    allowed = (FOR_MORE_EPOCHS if extend else frozenset()) | (AFTER_DIVERGING if files.divergence() else frozenset())
    refuse_another_recipe(folder, recipe, but_for=allowed)


def change(folder: Path, recipe: Recipe) -> str | None:
    """Give the run in `folder` the settings of `recipe`; the recipe that it had, None if nothing differs."""
    files = RunFolder(folder)
    before = files.recipe
    if not differences(recipe_in(folder), recipe):
        return None
    files.change(dump_recipe(recipe), epochs=recipe.epochs)
    return before


def what_changed(run: Run, before: Recipe, recipe: Recipe) -> str:
    """One line: the settings, K and the learning rate of the coming epoch, before and after."""
    parts = [line.replace(" there, ", " before, ").replace(" here)", " now)") for line in differences(before, recipe)]
    schedule = recipe.local.schedule
    if before.epochs != recipe.epochs and isinstance(run.method, Local) and schedule.name == "norm-trend":
        layers = run.method.layers
        shift = schedule.shift or recurring_block(run.model, layers)
        old, new = (
            schedule.interval or interval(len(layers), shift, epochs, schedule.max_fraction)
            for epochs in (before.epochs, recipe.epochs)
        )
        parts.append(f"K, epochs between moves, from {old} to {new}")
    old_lr, new_lr = (lr_at(one)(run.finished) for one in (before, recipe))
    parts.append(f"learning rate of epoch {run.finished + 1} from {old_lr:.3g} to {new_lr:.3g}")
    return "; ".join(parts)


def ways_on(folder: Path) -> str:
    """How to go on with the run in `folder`."""
    files = RunFolder(folder)
    if files.read_summary() is not None:
        return f"it is finished: {EXTEND} goes on for more epochs,"
    if files.divergence() is not None:
        return way_out(files)
    return "go on with it by --resume"


def way_out(files: RunFolder) -> str:
    """What can be done with a run that has diverged."""
    rate = parse_recipe(files.recipe, "recipe.yaml").optimizer.lr / 10
    if not files.read_epochs():
        return f"the same command with --set optimizer.lr={rate:g}, say, starts anew in this folder"
    return f"--resume --out {files.path} --set optimizer.lr={rate:g}, say, goes on from its last checkpoint"
