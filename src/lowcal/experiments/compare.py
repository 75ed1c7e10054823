"""Methods side by side: trained in turn, epoch by epoch, so that a machine's drift hits all alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lowcal.data import Dataset
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import build_run, check, load_data
from lowcal.experiments.folders import (
    name_other_code,
    recipe_in,
    refuse_another_recipe,
    refuse_unwritable,
    refuse_used,
)
from lowcal.experiments.kernels import kernels_of
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.threads import cpu_threads
from lowcal.methods import METHODS, find_method
from lowcal.report import Report, write_report
from lowcal.training.environment import code_digest
from lowcal.training.ranks import Ranks
from lowcal.training.record import RunFolder
from lowcal.training.trainer import Run


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    *,
    data_dir: Path | None,
    device: torch.device,
    watcher: Watcher,
) -> Report:
    """Train every method with `seeds` seeds, counted up from the recipe's, and write the report to `out`.

    Each run has a folder of its own in `out`. Runs that are there already are taken up where they stopped, so that
    an interrupted comparison is finished by calling this again.

    Raises:
        LowcalError: a method is unknown or does not apply, `out` holds something else or another recipe's runs, the
            data cannot be used, or a run diverges. Nothing is written unless training has begun.
    """
    _refuse_wrong_names(methods)
    arms = [Arm(method, recipe.seed + number) for number in range(seeds) for method in methods]
    _refuse_strange(out, recipe)
    refuse_unwritable(out)
    data = load_data(recipe, data_dir)
    note_skipped(data, watcher)
    check(recipe, list(methods), data, device)
    waiting = [arm for arm in arms if not _is_finished(out / arm.folder)]
    if len(waiting) < len(arms):
        watcher.note(f"{out}: {len(arms) - len(waiting)} of {len(arms)} runs are finished already")
        name_other_code([out / arm.folder for arm in arms if arm not in waiting], watcher)
    for number in range(seeds):
        in_turn = [arm for arm in waiting if arm.seed == recipe.seed + number]
        later = recipe.epochs * sum(arm.seed > recipe.seed + number for arm in waiting)
        if in_turn:
            train_in_turn(recipe, in_turn, out, data=data, device=device, watcher=watcher, later=later)
    return write_report([out / arm.folder for arm in arms], out)


def train_in_turn(
    recipe: Recipe,
    arms: Sequence[Arm],
    out: Path,
    *,
    data: Dataset,
    device: torch.device,
    watcher: Watcher,
    later: int = 0,
) -> None:
    """Train the arms to their ends, one epoch each in turn; the order goes round, so that none is always first.

    `later` epochs of other arms come after these; the watcher is told.
    """
    with cpu_threads(recipe.threads), kernels_of(recipe):
        data = data.to(device)  # once for all arms
        runs = [prepare(recipe, arm, out / arm.folder, data=data, device=device, watcher=watcher) for arm in arms]
        take_turns(arms, runs, watcher, epochs=recipe.epochs, later=later)


def take_turns(arms: Sequence[Arm], runs: Sequence[Run], watcher: Watcher, *, epochs: int, later: int = 0) -> None:
    """Train runs that are prepared to their ends as `train_in_turn` does; none has more than `epochs` epochs."""
    watcher.begin(arms, [run.finished for run in runs], epochs, later=later)
    for run in runs:
        run.warm_up()
    pairs = list(zip(arms, runs, strict=True))
    for epoch in range(epochs):
        first = epoch % len(pairs)
        for arm, run in pairs[first:] + pairs[:first]:
            if run.finished == epoch and not run.done:
                advance(arm, run, watcher)
    for run in runs:
        run.finish()


def prepare(
    recipe: Recipe,
    arm: Arm,
    folder: Path,
    *,
    data: Dataset,
    device: torch.device,
    watcher: Watcher,
    ranks: Ranks | None = None,
    anew: bool = False,
) -> Run:
    """The run of an arm: a new one, or the one that is in `folder` already, from its newest checkpoint on.

    One that `RunFolder.may_be_replaced` is replaced if it is to begin `anew`, or has another recipe.
    """
    ranks = ranks or Ranks()
    own = replace(recipe, seed=arm.seed)
    reopen, replaced = ranks.from_main(lambda: _clear(folder, own, len(data.classes), anew=anew))
    if replaced:
        watcher.note(f"{arm.folder}: replaces a run in {folder} that had finished no epoch")
    run = build_run(own, method=arm.method, folder=folder, data=data, device=device, reopen=reopen, ranks=ranks)
    if reopen:
        for text in run.resume():
            watcher.note(f"{arm.folder}: {text}")
        if ranks.is_main:
            name_other_code([folder], watcher)
            if not run.done:
                run.folder.note_code(code_digest())
        if run.finished_steps:
            watcher.note(f"{arm.folder}: goes on after step {run.finished_steps} of epoch {run.finished + 1}")
        elif run.finished:
            watcher.note(f"{arm.folder}: goes on after epoch {run.finished} of {run.epochs}")
    return run


def _clear(folder: Path, recipe: Recipe, classes: int, *, anew: bool) -> tuple[bool, bool]:
    """Whether the run in `folder` goes on, and whether there was one that is removed now.

    Raises:
        LowcalError: it would go on, but was started on images of another number of classes.
    """
    if not RunFolder.holds_run(folder):
        return False, False
    files = RunFolder(folder)
    replaced = files.may_be_replaced() and (anew or recipe_in(folder) != recipe)
    if replaced:
        files.clear()
        return False, True
    images = files.read_identity().get("images")  # absent in runs of earlier versions
    if images is not None and images["classes"] != classes:
        raise LowcalError(
            f"{folder} was started on images of {images['classes']} classes, but these have {classes}; "
            "give the --data-dir that it was started with"
        )
    return True, False


def advance(arm: Arm, run: Run, watcher: Watcher, way_out: Callable[[RunFolder], str] | None = None) -> None:
    """Train for one epoch; `way_out` says what can be done if it diverges."""
    try:
        record = run.run_epoch(lambda progress: watcher.step(arm, progress))
    except LowcalError as error:
        way = f"; {way_out(run.folder)}" if way_out and run.ranks.is_main and run.folder.divergence() else ""
        # The cause tells a full disk from a bad setting.
        raise LowcalError(f"{arm.folder}: {error}{way}") from error.__cause__
    watcher.epoch(arm, record)
    for text in run.news:
        watcher.note(f"{arm.folder}: {text}")


def note_skipped(data: Dataset, watcher: Watcher) -> None:
    """Say which files of the data were left out."""
    if data.skipped:
        watcher.note(f"skipped {len(data.skipped)} unusable file(s), the first: {data.skipped[0]}")


def _refuse_wrong_names(methods: Sequence[str]) -> None:
    for method in methods:
        find_method(method)
    if len(set(methods)) < len(methods):
        raise LowcalError(f"methods {','.join(methods)}: one is named twice; name each once")


def _refuse_strange(out: Path, recipe: Recipe) -> None:
    """Refuse a folder with something other than this comparison's runs in it."""
    if RunFolder.holds_run(out):
        raise LowcalError(f"{out} is a single run, not a comparison; choose another --out")
    ours = re.compile(rf"({'|'.join(METHODS)})-seed\d+")
    arms = [entry for entry in out.iterdir() if ours.fullmatch(entry.name)] if out.is_dir() else []
    if not arms:
        refuse_used(out, "a comparison")
    for folder in sorted(arms):
        if RunFolder.holds_run(folder) and not RunFolder(folder).may_be_replaced():
            seed = int(folder.name.rpartition("-seed")[2])
            refuse_another_recipe(folder, replace(recipe, seed=seed))


def _is_finished(folder: Path) -> bool:
    return RunFolder.holds_run(folder) and RunFolder(folder).read_summary() is not None
