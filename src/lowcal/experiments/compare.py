"""Methods side by side: trained in turn, epoch by epoch, so that a drift of the machine affects all equally."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowcal.data import Dataset
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import build_run, check, load_data
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.budget import met, plan_budget
from lowcal.experiments.folders import (
    name_other_code,
    recipe_in,
    refuse_another_recipe,
    refuse_unwritable,
    refuse_used,
)
from lowcal.experiments.recipe import Recipe
from lowcal.methods import METHODS, find_method
from lowcal.methods.boundary import Local
from lowcal.report.page import Report, write_report
from lowcal.report.runs import COMPRESSED, SAME_TIME
from lowcal.training.distributed import TrainingGroup
from lowcal.training.environment import code_digest
from lowcal.training.run import Run
from lowcal.training.run_folder import RunFolder


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

    Each run has its own folder in `out`. Existing runs are resumed, so calling this again finishes an interrupted
    comparison.

    Raises:
        LowcalError: a method is unknown or does not apply, `out` holds something else or another recipe's runs, the
            data cannot be used, or a run diverges. Nothing is written unless training has begun.
    """
    _refuse_wrong_names(methods)
    has_rival = COMPRESSED in methods
    methods = [method for method in methods if method != COMPRESSED]
    arms = [Arm(method, recipe.seed + number) for number in range(seeds) for method in methods]
    _refuse_strange(out, recipe)
    refuse_unwritable(out)
    data = load_data(recipe, data_dir, watcher=watcher)
    note_skipped(data, watcher)
    if loaded := check(recipe, list(methods), data, device, out):
        watcher.note(loaded)
    waiting = [arm for arm in arms if not _is_finished(out / arm.folder)]
    if len(waiting) < len(arms):
        watcher.note(f"{out}: {len(arms) - len(waiting)} of {len(arms)} runs are finished already")
        name_other_code([out / arm.folder for arm in arms if arm not in waiting], watcher)
    begun = {arm.method for arm in waiting if not RunFolder.holds_run(out / arm.folder)}
    times = plan_budget(recipe, [method for method in methods if method in begun], data, device, watcher)
    for number in range(seeds):
        in_turn = [arm for arm in waiting if arm.seed == recipe.seed + number]
        later = recipe.epochs * sum(arm.seed > recipe.seed + number for arm in waiting)
        if in_turn:
            train_in_turn(recipe, in_turn, out, data=data, device=device, watcher=watcher, later=later, times=times)
        for arm in in_turn:
            if line := met(recipe, _summary(out / arm.folder) or {}, _summary(out / f"sgd-seed{arm.seed}")):
                watcher.note(f"{arm.folder}: {line}")
    for rival in _rivals(recipe, methods, arms, out) if has_rival else []:
        variant = f"{COMPRESSED.partition('-')[2]}-{rival.epochs}"
        own = [Arm("sgd", recipe.seed + number, variant, rival.epochs) for number in range(seeds)]
        for arm in own:
            if not _is_finished(out / arm.folder):
                train_in_turn(rival, [arm], out, data=data, device=device, watcher=watcher)
        arms += own
    return write_report([out / arm.folder for arm in arms], out)


def _rivals(recipe: Recipe, methods: Sequence[str], arms: Sequence[Arm], out: Path) -> list[Recipe]:
    """The recipes of SGD in the time of each other method: the whole schedule in the fewest epochs that take as long.

    A few percent less count as the same time (`SAME_TIME`), so that two epochs and a bit are not three.
    """
    taken = dict.fromkeys(methods, 0.0)
    for arm in arms:
        taken[arm.method] += (_summary(out / arm.folder) or {})["seconds"]
    parts = [seconds / taken["sgd"] for method, seconds in taken.items() if method != "sgd"]
    lengths = {min(recipe.epochs, max(1, math.ceil(SAME_TIME * part * recipe.epochs))) for part in parts}
    return [compressed(recipe, epochs) for epochs in sorted(lengths)]


def compressed(recipe: Recipe, epochs: int) -> Recipe:
    """`recipe` with its whole learning-rate schedule in `epochs` epochs."""
    rates = recipe.lr_schedule
    warmup = rates.warmup_epochs * epochs / recipe.epochs
    rates = replace(rates, epochs=rates.epochs or recipe.epochs, fit="compressed", warmup_epochs=warmup)
    return replace(recipe, epochs=epochs, lr_schedule=rates)


def train_in_turn(
    recipe: Recipe,
    arms: Sequence[Arm],
    out: Path,
    *,
    data: Dataset,
    device: torch.device,
    watcher: Watcher,
    later: int = 0,
    times: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """Train the arms to their ends, one epoch each in turn; the order rotates, so that none is always first.

    `later` is the number of epochs of other arms that follow; the watcher shows it. `times` are step times by method,
    with which a budget plans.
    """
    with cpu_threads(recipe.threads), kernels_of(recipe):
        data = data.to(device)  # once for all arms
        runs = [
            prepare(recipe, arm, out / arm.folder, data=data, device=device, watcher=watcher, times=times)
            for arm in arms
        ]
        take_turns(arms, runs, watcher, epochs=recipe.epochs, later=later)


def take_turns(arms: Sequence[Arm], runs: Sequence[Run], watcher: Watcher, *, epochs: int, later: int = 0) -> None:
    """Train prepared runs to their ends as `train_in_turn` does; none has more than `epochs` epochs."""
    watcher.begin(arms, [run.finished for run in runs], epochs, later=later)
    pairs = list(zip(arms, runs, strict=True))
    for arm, run in pairs:
        warm_up(arm, run, watcher)
    for epoch in range(epochs):
        first = epoch % len(pairs)
        for arm, run in pairs[first:] + pairs[:first]:
            if run.finished == epoch and not run.done:
                advance(arm, run, watcher)
    for run in runs:
        run.finish()


def warm_up(arm: Arm, run: Run, watcher: Watcher) -> None:
    """Warm a run up, and choose its step if the recipe leaves that to it."""
    watcher.stage(f"{arm.folder}: warming up" + " and choosing the step" * (run.state.step_mode is None))
    notes = run.warm_up()
    watcher.stage("")
    for text in notes:
        watcher.note(f"{arm.folder}: {text}")


def prepare(
    recipe: Recipe,
    arm: Arm,
    folder: Path,
    *,
    data: Dataset,
    device: torch.device,
    watcher: Watcher,
    group: TrainingGroup | None = None,
    start_over: bool = False,
    times: Mapping[str, Mapping[int, float]] | None = None,
) -> Run:
    """The run of an arm: a new one, or the one in `folder`, resumed from its newest checkpoint.

    A run that `may_be_replaced` is replaced if `start_over` is set or its recipe differs.
    """
    group = group or TrainingGroup()
    own = replace(recipe, seed=arm.seed)
    reopen, replaced = group.from_main(lambda: _clear(folder, own, len(data.classes), start_over=start_over))
    if replaced:
        watcher.note(f"{arm.folder}: replaces a run in {folder} that had finished no epoch")
    run = build_run(
        own,
        method=arm.method,
        variant=arm.variant,
        folder=folder,
        data=data,
        device=device,
        reopen=reopen,
        group=group,
    )
    if reopen:
        for text in run.resume():
            watcher.note(f"{arm.folder}: {text}")
        if group.is_main:
            name_other_code([folder], watcher)
            if not run.done:
                run.folder.note_code(code_digest())
        if run.finished_steps:
            watcher.note(f"{arm.folder}: goes on after step {run.finished_steps} of epoch {run.finished + 1}")
        elif run.finished:
            watcher.note(f"{arm.folder}: goes on after epoch {run.finished} of {run.epochs}")
    if not reopen and times and isinstance(run.method, Local) and arm.method in times:
        run.method.plan(times[arm.method])
    return run


def _clear(folder: Path, recipe: Recipe, classes: int, *, start_over: bool) -> tuple[bool, bool]:
    """Whether the run in `folder` continues, and whether one has been removed.

    Raises:
        LowcalError: it would continue, but was started on images of another number of classes.
    """
    if not RunFolder.holds_run(folder):
        return False, False
    files = RunFolder(folder)
    replaced = files.may_be_replaced() and (start_over or recipe_in(folder) != recipe)
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
        way = f"; {way_out(run.folder)}" if way_out and run.group.is_main and run.folder.divergence() else ""
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
    if not methods:
        raise LowcalError("no method was given; give at least one, as in sgd,local")
    for method in methods:
        if method != COMPRESSED:
            find_method(method)
    if COMPRESSED in methods and ("sgd" not in methods or len(set(methods)) < 3):
        raise LowcalError(
            f"methods {','.join(methods)}: {COMPRESSED} is sized by sgd's time and another method's; "
            f"as in --methods sgd,freeze,{COMPRESSED}"
        )
    if len(set(methods)) < len(methods):
        raise LowcalError(f"methods {','.join(methods)}: one is given twice; give each once")


def _refuse_strange(out: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds anything other than runs of this comparison."""
    if RunFolder.holds_run(out):
        raise LowcalError(f"{out} is a single run, not a comparison; choose another --out")
    ours = re.compile(rf"({'|'.join(METHODS)}|{COMPRESSED}-\d+)-seed\d+")
    arms = [entry for entry in out.iterdir() if ours.fullmatch(entry.name)] if out.is_dir() else []
    if not arms:
        refuse_used(out, "a comparison")
    for folder in sorted(arms):
        if RunFolder.holds_run(folder) and not RunFolder(folder).may_be_replaced():
            seed = int(folder.name.rpartition("-seed")[2])
            own = recipe
            if folder.name.startswith(COMPRESSED):
                own = compressed(recipe, int(folder.name.removeprefix(f"{COMPRESSED}-").partition("-")[0]))
            refuse_another_recipe(folder, replace(own, seed=seed))


def _is_finished(folder: Path) -> bool:
    return _summary(folder) is not None


def _summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is none."""
    return RunFolder(folder).read_summary() if RunFolder.holds_run(folder) else None
