"""Training what a table needs: searches of settings first, then the cells of one network and seed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from lowcal.data import CLASSES, IMAGES
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.compare import note_skipped, prepare, take_turns
from lowcal.experiments.folders import name_other_code, refuse_unwritable
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.reproduce.paper import Cell, PaperTable, choose
from lowcal.experiments.reproduce.results import Results
from lowcal.experiments.reproduce.write import write
from lowcal.experiments.sweep import Sweep, require_optuna, sweep
from lowcal.models import build_model
from lowcal.report.table import Table, duration
from lowcal.steps.step import now
from lowcal.training.run_folder import RunFolder

SMALL_BATCH = 8  # of an estimate on a CPU, where a step's time is proportional to its images
ESTIMATE_SECONDS = 5.0  # after which an estimate uses the steps so far
IMAGENET_SIZE = 224  # pixels; the other data sets have 32


def reproduce(
    name: str,
    results: Results,
    *,
    seeds: int,
    cells: str | None = None,
    device: torch.device,
    watcher: Watcher,
) -> tuple[Table, list[Path]]:
    """Train what is missing of table or figure `name`, and write it to the results folder; the table and the files.

    Args:
        seeds: runs of each cell, with seeds counted up from the recipe's.
        cells: patterns of the cells to train, see `choose`; None: all.

    Raises:
        LowcalError: the name, a pattern, the folder or the data are wrong, or a run diverges.
    """
    table, chosen, waiting = _find(name, results, seeds, cells)
    refuse_unwritable(results.out)
    done = len(chosen) * seeds - len(waiting)
    if done:
        watcher.note(f"{results.out}: {done} of {len(chosen) * seeds} runs are finished already")
        name_other_code([run.path for cell in chosen for run in results.runs(cell, seeds)], watcher)
    if waiting:
        for recipe in dict.fromkeys(cell.recipe for cell, _ in waiting):
            load_data(results.base(recipe), results.images(recipe))  # an error now leaves nothing behind
        searched = unsearched(results, waiting)
        if searched:
            require_optuna()
        results.begin()
        for cell in searched:
            search(results, cell, device=device, watcher=watcher)
        train_missing(results, waiting, device=device, watcher=watcher)
    return write(table, results, seeds)


def _find(
    name: str, results: Results, seeds: int, patterns: str | None
) -> tuple[PaperTable, list[Cell], list[tuple[Cell, int]]]:
    """The table, the cells to train, and which of their runs are missing."""
    table = results.table(name)
    chosen = choose(table.cells, patterns)
    results.refuse_others(table.cells, seeds)
    return table, chosen, results.missing(chosen, seeds)


def train_missing(
    results: Results, waiting: Sequence[tuple[Cell, int]], *, device: torch.device, watcher: Watcher
) -> None:
    """Train the runs that `Results.missing` found; those that were interrupted go on where they stopped.

    Raises:
        LowcalError: data cannot be used, a cell does not fit it, or a run diverges.
    """
    left = sum(epochs_left(results, cell, seed) for cell, seed in waiting)
    for name, group in groupby(waiting, key=lambda entry: entry[0].recipe):
        own = list(group)
        data = load_data(results.base(name), results.images(name), watcher=watcher)
        note_skipped(data, watcher)
        for cell in dict.fromkeys(cell for cell, _ in own):
            check(results.recipe(cell), [cell.method], data, device)
        for seed, in_turn in groupby(own, key=lambda entry: entry[1]):
            cells = [cell for cell, _ in in_turn]
            recipes = [results.recipe(cell) for cell in cells]
            pairs = list(zip(cells, recipes, strict=True))
            arms = [Arm(cell.method, seed, cell.folder_variant, recipe.epochs) for cell, recipe in pairs]
            watcher.note(f"{name}, seed {seed}: {', '.join(cell.name for cell in cells)}")
            results.note_turns(name, [arm.folder for arm in arms])
            left -= sum(epochs_left(results, cell, seed) for cell in cells)
            with cpu_threads(recipes[0].threads), kernels_of(recipes[0]):
                data = data.to(device)  # once for all cells
                runs = [
                    prepare(recipe, arm, results.group(name) / arm.folder, data=data, device=device, watcher=watcher)
                    for recipe, arm in zip(recipes, arms, strict=True)
                ]
                take_turns(arms, runs, watcher, epochs=max(recipe.epochs for recipe in recipes), later=left)


def epochs_left(results: Results, cell: Cell, seed: int) -> int:
    """The epochs of a cell's run that are not trained yet."""
    return results.recipe(cell).epochs - results.epochs_done(cell, seed)


def unsearched(results: Results, waiting: Iterable[tuple[Cell, int]]) -> list[Cell]:
    """The cells whose settings must be searched first, each once."""
    return [cell for cell in dict.fromkeys(cell for cell, _ in waiting) if cell.searches and not results.found(cell)]


def plan_search(results: Results, cell: Cell) -> Sweep:
    """The sweep that finds a cell's settings on held-out training images, by error and FLOPs."""
    recipe, trials = results.recipe(cell), results.sizes["trials"]
    return Sweep(recipe, cell.method, cell.searches, trials=trials, objective="top1_error,flops")


def search(results: Results, cell: Cell, *, device: torch.device, watcher: Watcher) -> None:
    """Search a cell's settings; a search that was interrupted goes on where it stopped.

    Raises:
        LowcalError: data is missing, the folder holds another sweep, or no trial has a result.
    """
    plan, folder = plan_search(results, cell), results.search_folder(cell)
    keys = ", ".join(one.key for one in plan.searches)
    watcher.note(f"{cell.id}: {plan.trials} trials to find {keys}; in {folder}")
    sweep(plan, folder, data_dir=results.images(cell.recipe), device=device, watcher=watcher)
    found = results.found(cell)
    if found is None:
        raise LowcalError(
            f"{cell.id}: no trial of the search in {folder} has a result; see sweep.md there, and give "
            f"settings by --set instead, as in --set {plan.searches[0].key}=..."
        )
    watcher.note(f"{cell.id}: {found}")


class Planned(NamedTuple):
    """A training that a table needs, or a search of several `runs`, which has no seed.

    `seconds`: of what is left, at the speed of a plain SGD step; None if it is finished.
    """

    cell: str
    seed: int | None
    state: str
    seconds: float | None
    runs: int = 1


def dry_run(
    name: str, results: Results, *, seeds: int, cells: str | None = None, device: torch.device
) -> tuple[PaperTable, list[Planned]]:
    """What `reproduce` would train, and how long it would take at most; nothing is written.

    One SGD step of each network is measured; a step with local or frozen layers takes less.
    """
    table, chosen, waiting = _find(name, results, seeds, cells)
    speeds: dict[tuple[str, int], float] = {}

    def seconds(cell: Cell, epochs: int) -> float:
        recipe = results.recipe(cell)
        kind = (cell.recipe, recipe.batch.size)
        if kind not in speeds:
            speeds[kind] = epoch_seconds(recipe, device)
        return epochs * speeds[kind]

    entries = []
    searched = unsearched(results, waiting)
    for cell in chosen:
        epochs = results.recipe(cell).epochs
        if cell in searched:
            plan = plan_search(results, cell)
            trials = [run for run in results.search_folder(cell).glob("trial-*") if RunFolder.holds_run(run)]
            left = plan.trials * epochs - sum(len(RunFolder(run).read_epochs()) for run in trials)
            words = f"search: {plan.trials} trials of {epochs} epochs, {left} epochs left"
            entries.append(Planned(cell.id, None, words, seconds(cell, left), plan.trials))
        for seed in results.seeds(cell.recipe, seeds):
            if (cell, seed) not in waiting:
                entries.append(Planned(cell.id, seed, "finished", None))
                continue
            left = epochs_left(results, cell, seed)
            words = f"{left} epochs" if left == epochs else f"{epochs - left} of {epochs} epochs done"
            entries.append(Planned(cell.id, seed, words, seconds(cell, left)))
    return table, entries


def plan_text(table: PaperTable, entries: Sequence[Planned]) -> str:
    """What `--dry-run` prints."""
    lines = [table.title, ""]
    longest = max((len(entry.cell) for entry in entries), default=0)
    for entry in entries:
        seed = "" if entry.seed is None else f"seed {entry.seed}"
        time = "" if entry.seconds is None else f", at most {duration(entry.seconds)}"
        lines.append(f"{entry.cell:<{longest}}  {seed:<7}  {entry.state}{time}")
    waiting = [(entry.runs, entry.seconds) for entry in entries if entry.seconds is not None]
    if not waiting:
        return "\n".join([*lines, "", "nothing to run"])
    runs, seconds = (sum(column) for column in zip(*waiting, strict=True))
    lines += ["", f"{runs} runs, at most {duration(seconds)} of training"]
    lines.append("from a few SGD steps of each network; without decoding, evaluation and start-up")
    return "\n".join(lines)


def epoch_seconds(recipe: Recipe, device: torch.device, *, steps: int = 3) -> float:
    """The time of an epoch of SGD without evaluation, from at most `steps` steps on images of its size.

    The images are random and on the device already. So the data may be missing, and decoding does not count.
    """
    data = recipe.data
    batch = recipe.batch.size if device.type == "cuda" else min(recipe.batch.size, SMALL_BATCH)
    pixels = data.image_size or (IMAGENET_SIZE if data.name == "imagenet" else 32)
    classes = data.classes or CLASSES.get(data.name, 10)
    with cpu_threads(recipe.threads), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = build_model(recipe.model.name, classes=classes, width=recipe.model.width).to(device).train()
        optimizer = SGD(model.parameters(), lr=1e-3, momentum=recipe.optimizer.momentum, fused=True)
        images = torch.randn(batch, 3, pixels, pixels, device=device)
        labels = torch.arange(batch, device=device) % classes
        times: list[float] = []
        while len(times) < 2 or (len(times) <= steps and sum(times) < ESTIMATE_SECONDS):
            start = now(device)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            times.append(now(device) - start)
    count = data.train_images or IMAGES[data.name][0]
    return statistics.median(times[1:]) * count / batch
