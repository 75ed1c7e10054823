"""A single run, by one process or by several that share each mini-batch: new, resumed, or extended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.budget import met, plan_budget
from lowcal.experiments.compare import advance, note_skipped, prepare, warm_up
from lowcal.experiments.folders import recipe_in, refuse_another_recipe, refuse_unwritable, refuse_used
from lowcal.experiments.recipe import Recipe, lr_at
from lowcal.experiments.recipe_text import differences, dump_recipe, parse_recipe
from lowcal.layers import recurring_block
from lowcal.methods.boundary import Local
from lowcal.schedule import interval
from lowcal.training.distributed import TrainingGroup
from lowcal.training.run import Run
from lowcal.training.run_folder import RunFolder
from lowcal.training.signals import deferred

FOR_MORE_EPOCHS = frozenset({"epochs", "lr_schedule.epochs"})
AFTER_DIVERGING = frozenset({"optimizer.lr", "local.lr", "guard.max_skips"})
EXTEND = "--resume --extend --set epochs=N"


def started_with(folder: Path, group: TrainingGroup) -> tuple[Recipe, str]:
    """The recipe and the method of the run in `folder`."""

    def read() -> tuple[str, str]:
        files = RunFolder.open(folder)
        return files.recipe, files.read_identity()["method"]

    text, method = group.from_main(read)
    return parse_recipe(text, str(folder / "recipe.yaml")), method


def train(
    recipe: Recipe,
    method: str,
    folder: Path,
    *,
    resume: bool,
    extend: bool = False,
    data_dir: Path | None,
    group: TrainingGroup,
    watcher: Watcher,
) -> dict[str, Any]:
    """Train one network by one method in `folder`, or with `resume` continue the run there.

    With `extend` the run continues to a larger number of epochs, and after it has diverged with other rates. A run in
    `folder` that has finished no epoch and saved nothing is replaced.

    Each of several processes calls this function; all end in the same way. After torchrun has restarted them they
    resume the run.

    Args:
        group: the processes, each with its device.

    Returns:
        What the run's `summary.json` holds.

    Raises:
        LowcalError: as `compare` does; with `resume` also if the run there is of another recipe or method, or its
            checkpoints cannot be used.
    """
    if group.world > 1:
        _refuse_for_many(recipe, group.world)
    restarts = group.max(group.launch.restarts)  # torchrun counts on each machine for itself
    goes_on = resume or group.from_main(lambda: restarts > 0 and RunFolder.holds_run(folder))
    summary = group.from_main(lambda: _look(recipe, method, folder, goes_on=goes_on, extend=extend))
    if summary is not None:
        watcher.note(f"{folder} is finished already; {EXTEND} goes on for more epochs")
        return summary
    with group.local_main_first():  # data may have to be downloaded, or decoded and kept
        data = load_data(recipe, data_dir, group.launch, watcher)
    note_skipped(data, watcher)
    if loaded := group.from_main(lambda: check(recipe, [method], data, group.device, folder)):
        watcher.note(loaded)
    times = (
        {}
        if goes_on
        else group.from_main(lambda: plan_budget(recipe, [method], data, group.device, watcher, group.world))
    )
    arm = Arm(method, recipe.seed)
    with cpu_threads(recipe.threads), kernels_of(recipe):
        before = group.from_main(lambda: change(folder, recipe) if goes_on else None)
        run = prepare(
            recipe,
            arm,
            folder,
            data=data,
            device=group.device,
            watcher=watcher,
            group=group,
            start_over=not goes_on,
            times=times,
        )
        if before is not None:
            changed = what_changed(run, parse_recipe(before, str(folder / "recipe.yaml")), recipe)
            watcher.note(f"{arm.folder}: {changed}")
        watcher.begin([arm], [run.finished], recipe.epochs)
        warm_up(arm, run, watcher)
        with deferred():  # between epochs too, where one process alone must not leave
            while not run.done:
                advance(arm, run, watcher, way_out)
        summary = run.finish()
        if line := met(recipe, summary, None):
            watcher.note(f"{arm.folder}: {line}")
        return summary


def _refuse_for_many(recipe: Recipe, world: int) -> None:
    """Refuse settings that several processes cannot use."""
    if recipe.batch.size < world:
        raise LowcalError(
            f"batch.size={recipe.batch.size}: is divided among {world} processes, so it must be at least {world}; "
            "--set batch.size=N, or start fewer"
        )
    if recipe.cache.where != "none":
        raise LowcalError(f"cache={recipe.cache.where}: is for one process; --set cache=none, or start it alone")
    if recipe.step not in ("auto", "eager"):
        raise LowcalError(f"step={recipe.step}: is for one process; --set step=eager, or start it without torchrun")


def _look(recipe: Recipe, method: str, folder: Path, *, goes_on: bool, extend: bool) -> dict[str, Any] | None:
    """Refuse a folder that cannot be used; the summary of a run that is finished there, None if there is none."""
    files = RunFolder(folder)
    if goes_on:
        started = RunFolder.open(folder).read_identity()["method"]
        if method != started:
            raise LowcalError(
                f"{folder} is a run of '{started}', not of '{method}'; leave --method out to go on with it"
            )
        refuse_changes(folder, recipe, extend=extend)
        summary = files.read_summary()
        if summary is not None and not extend:
            return summary
    elif RunFolder.holds_run(folder):
        if not files.may_be_replaced():
            raise LowcalError(f"{folder} holds a run already; {ways_on(folder)} or choose another --out")
    elif not RunFolder.is_half_made(folder):
        refuse_used(folder, "a run")
    refuse_unwritable(folder)
    return None


def refuse_changes(folder: Path, recipe: Recipe, *, extend: bool) -> None:
    """Refuse to continue the run in `folder` under `recipe` if settings differ that must not.

    With `extend` the number of epochs may grow. In a run that has diverged, the settings that may be the reason can be
    changed.
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
    """Give the run in `folder` the settings of `recipe`; returns its recipe before, None if nothing differs."""
    files = RunFolder(folder)
    before = files.recipe
    if not differences(recipe_in(folder), recipe):
        return None
    files.change(dump_recipe(recipe), epochs=recipe.epochs)
    return before


def what_changed(run: Run, before: Recipe, recipe: Recipe) -> str:
    """One line: the settings, K and the learning rate of the next epoch, before and after."""
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
    """How to continue the run in `folder`."""
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
        return f"the same command with --set optimizer.lr={rate:g}, say, starts again in this folder"
    return f"--resume --out {files.path} --set optimizer.lr={rate:g}, say, goes on from its last checkpoint"
