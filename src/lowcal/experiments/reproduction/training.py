"""Training the cells that are missing, those of one network and seed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch

from lowcal.experiments.arms import Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.backends import cpu_threads, kernels_of
from lowcal.experiments.compare import note_skipped, prepare, take_turns
from lowcal.experiments.reproduction.cells import Cell
from lowcal.experiments.reproduction.results import Results


def missing(results: Results, cells: Sequence[Cell], seeds: int) -> list[tuple[Cell, int]]:
    """The cells whose runs are not finished, with the seed, in the order in which they are trained."""
    waiting = []
    for recipe, group in groupby(cells, key=lambda cell: cell.recipe):
        first, own = results.base(recipe).seed, list(group)
        waiting += [
            (cell, seed)
            for seed in range(first, first + seeds)
            for cell in own
            if not results.state(cell, seed).is_complete
        ]
    return waiting


def check_data(results: Results, recipes: Iterable[str]) -> None:
    """Read the data of each recipe once, so that what is wrong is found before anything is written or trained.

    Raises:
        LowcalError: data is not there, cannot be read, or is not the data set of the paper.
    """
    for name in recipes:
        load_data(results.base(name), results.images(name))


def train_missing(
    results: Results, waiting: Sequence[tuple[Cell, int]], *, device: torch.device, watcher: Watcher
) -> None:
    """Train what `missing` found; runs that were interrupted go on where they stopped.

    Raises:
        LowcalError: data cannot be used, a cell does not fit it, or a run diverges.
    """
    left = sum(results.recipe(cell).epochs - results.state(cell, seed).finished for cell, seed in waiting)
    for name, group in groupby(waiting, key=lambda entry: entry[0].recipe):
        own = list(group)
        data = load_data(results.base(name), results.images(name))
        note_skipped(data, watcher)
        for cell in dict.fromkeys(cell for cell, _ in own):
            check(results.recipe(cell), [cell.method], data, device)
        for seed, in_turn in groupby(own, key=lambda entry: entry[1]):
            cells = [cell for cell, _ in in_turn]
            arms = [results.arm(cell, seed) for cell in cells]
            recipes = [results.recipe(cell) for cell in cells]
            watcher.note(f"{name}, seed {seed}: {', '.join(cell.name for cell in cells)}")
            results.note_turns(name, [arm.folder for arm in arms])
            epochs = max(recipe.epochs for recipe in recipes)
            left -= sum(results.recipe(cell).epochs - results.state(cell, seed).finished for cell in cells)
            with cpu_threads(recipes[0].threads), kernels_of(recipes[0]):
                data = data.to(device)  # once for all cells
                runs = [
                    prepare(recipe, arm, results.group(name) / arm.folder, data=data, device=device, watcher=watcher)
                    for recipe, arm in zip(recipes, arms, strict=True)
                ]
                take_turns(arms, runs, watcher, epochs=epochs, later=left)
