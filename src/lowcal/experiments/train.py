"""A single run, by one process or by several that share each mini-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.compare import advance, note_skipped, prepare
from lowcal.experiments.folders import refuse_unwritable, refuse_used
from lowcal.experiments.going_on import EXTEND, change, refuse_changes, way_out, ways_on, what_changed
from lowcal.experiments.kernels import kernels_of
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import parse_recipe
from lowcal.experiments.threads import cpu_threads
from lowcal.training.interrupt import deferred
from lowcal.training.ranks import Ranks
from lowcal.training.record import RunFolder


def started_with(folder: Path, ranks: Ranks) -> tuple[Recipe, str]:
    """The recipe and the method of the run in `folder`."""

    def read() -> tuple[str, str]:
        files = RunFolder.open(folder)
        return files.recipe, files.read_identity()["method"]

    text, method = ranks.from_main(read)
    return parse_recipe(text, str(folder / "recipe.yaml")), method


def train(
    recipe: Recipe,
    method: str,
    folder: Path,
    *,
    resume: bool,
    extend: bool = False,
    data_dir: Path | None,
    ranks: Ranks,
    watcher: Watcher,
) -> dict[str, Any]:
    """Train one network by one method in `folder`, or with `resume` go on with the run that is there.

    With `extend` it goes on to a larger number of epochs than it was started with, and after it has diverged with other
    rates. A run in `folder` that has finished no epoch and saved nothing is replaced.

    Each of several processes calls it; all come to the same end. After torchrun has started them anew they go on with
    the run as if told to resume.

    Args:
        ranks: the processes, each with its device.

    Returns:
        What the run's `summary.json` holds.

    Raises:
        LowcalError: as `compare` does; with `resume` also if the run there is of another recipe or method, or its
            checkpoints cannot be used.
    """
    if ranks.world > 1:
        _refuse_for_many(recipe, ranks.world)
    restarts = ranks.most(ranks.launch.restarts)  # torchrun counts on each machine for itself
    goes_on = resume or ranks.from_main(lambda: restarts > 0 and RunFolder.holds_run(folder))
    summary = ranks.from_main(lambda: _look(recipe, method, folder, goes_on=goes_on, extend=extend))
    if summary is not None:
        watcher.note(f"{folder} is finished already; {EXTEND} goes on for more epochs")
        return summary
    with ranks.one_first():  # data may have to be downloaded, or decoded and kept
        data = load_data(recipe, data_dir, ranks.launch)
    note_skipped(data, watcher)
    ranks.from_main(lambda: check(recipe, [method], data, ranks.device))
    arm = Arm(method, recipe.seed)
    with cpu_threads(recipe.threads), kernels_of(recipe):
        before = ranks.from_main(lambda: change(folder, recipe) if goes_on else None)
        run = prepare(
            recipe, arm, folder, data=data, device=ranks.device, watcher=watcher, ranks=ranks, anew=not goes_on
        )
        if before is not None:
            changed = what_changed(run, parse_recipe(before, str(folder / "recipe.yaml")), recipe)
            watcher.note(f"{arm.folder}: {changed}")
        watcher.begin([arm], [run.finished], recipe.epochs)
        run.warm_up()
        with deferred():  # between epochs too, where one process alone must not leave
            while not run.done:
                advance(arm, run, watcher, way_out)
        return run.finish()


def _refuse_for_many(recipe: Recipe, world: int) -> None:
    """Refuse what does not go with several processes."""
    if recipe.batch.size < world:
        raise LowcalError(
            f"batch.size={recipe.batch.size}: is shared among {world} processes, so it must be as many images or more; "
            "--set batch.size=N, or start fewer"
        )
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
