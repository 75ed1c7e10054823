"""The results folder: one run folder for each cell and seed, shared by all tables, at one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import lowcal
from lowcal.data import CLASSES
from lowcal.errors import LowcalError, nearest
from lowcal.experiments.arms import Arm
from lowcal.experiments.folders import refuse_another_recipe, refuse_used
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, load_recipe, show_value
from lowcal.experiments.reproduce.paper import Cell, PaperTable, digest, make_cell, make_table, own_settings, paper
from lowcal.experiments.search_space import parse_search
from lowcal.files import FORMAT, read_json, write_json
from lowcal.report.runs import RunData, read_run
from lowcal.training.run_folder import RunFolder

MARK = "reproduce.json"
TURNS = "turns.json"
EACH_CLASS = 5  # training images at least, so that a search can hold out a fifth of them


class Found(NamedTuple):
    """The settings that a finished search ends with, each as `key=value`; which of how many trials had them."""

    settings: tuple[str, ...]
    trial: int
    trials: int

    def __str__(self) -> str:
        return f"{', '.join(self.settings)}, trial {self.trial} of a search of {self.trials}"


class Results:
    """The results folder `out` at the scale called `scale`, under the user's `settings`.

    A run is in RECIPE-SCALE/METHOD-VARIANT-seedN; the variant of a run that the user's settings change ends with
    their digest.

    Raises:
        LowcalError: there is no such scale.
    """

    def __init__(self, out: Path, scale: str, *, settings: Sequence[str] = (), data_dir: Path | None = None) -> None:
        scales = paper()["scales"]
        if scale not in scales:
            raise LowcalError(f"unknown scale '{scale}'{nearest(scale, scales)}")
        self.out = out
        self.scale = scale
        self.sizes: Mapping[str, Any] = scales[scale]
        self.settings = tuple(settings)
        self.data_dir = data_dir
        self._bases: dict[str, Recipe] = {}

    def table(self, name: str) -> PaperTable:
        """The table or figure called `name`; LowcalError if there is none."""
        return make_table(name, self.base, self.settings)

    def cell(self, recipe: str, name: str) -> Cell:
        """The cell of a recipe called METHOD or METHOD-VARIANT."""
        return make_cell(recipe, name, self.base(recipe), self.settings)

    def base(self, name: str) -> Recipe:
        """The packaged recipe at this scale, with those of the user's settings that belong to no method."""
        if name not in self._bases:
            recipe = load_recipe(name)
            if self.scale != "full":
                label = f"{recipe.label}, scale {self.scale}{', synthetic images' * self.is_synthetic(name)}"
                settings = scaled(recipe, self.sizes, synthetic=self.is_synthetic(name))
                recipe = apply_settings(recipe, [], settings | {"label": label})
            self._bases[name] = apply_settings(recipe, own_settings("sgd", self.settings))
        return self._bases[name]

    def is_synthetic(self, name: str) -> bool:
        """Whether synthetic images replace those of the recipe `name`."""
        dataset = load_recipe(name).data.name
        return dataset in self.sizes["synthetic"] and image_folder(dataset, self.data_dir) is None

    def images(self, name: str) -> Path | None:
        """The folder of the recipe's images; None where they are synthetic or in the cache folder.

        Raises:
            LowcalError: a folder is needed and missing.
        """
        dataset = self.base(name).data.name
        folder = None if dataset == "synthetic" else image_folder(dataset, self.data_dir)
        if folder is None and dataset == "imagenet":
            raise LowcalError(
                f"{name} at scale {self.scale} needs ImageNet: give its folder with --data-dir, choose other "
                "--cells, or a smaller --scale, where synthetic images replace it"
            )
        if folder is None and dataset != "synthetic" and self.data_dir is not None:
            raise LowcalError(f"--data-dir {self.data_dir} has no folder '{dataset}', which {name} needs; put it there")
        return folder

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe of a cell's runs, but for the seed; before its search, the one where the search begins."""
        found = self.found(cell)
        return apply_settings(self.base(cell.recipe), [*cell.settings, *(found.settings if found else ())])

    def found(self, cell: Cell) -> Found | None:
        """What the cell's search has found; None if it has none, or one that is not finished or is another one.

        Of the trials whose error is no higher than the first one's, which has the common settings, that with the
        fewest FLOPs is taken. By error alone the search would end where nothing is local. Other than times, FLOPs
        are the same on every machine.
        """
        path = self.search_folder(cell) / "sweep.json"
        if not cell.searches or not path.exists():
            return None
        summary = read_json(path)
        rows = [row for row in summary["rows"] if row["reason"] is None]
        is_this = summary["search"] == [str(parse_search(text)) for text in cell.searches]
        if not rows or not is_this or len(summary["rows"]) < self.sizes["trials"]:
            return None
        first = [row["top1_error"] for row in rows if row["trial"] == 0]
        most = first[0] if first else min(row["top1_error"] for row in rows)
        within = [row for row in rows if row["top1_error"] <= most]
        best = min(within, key=lambda row: (row["flops"], row["top1_error"], row["trial"]))
        settings = tuple(f"{key}={show_value(value)}" for key, value in best["settings"].items())
        return Found(settings, best["trial"], len(summary["rows"]))

    def search_folder(self, cell: Cell) -> Path:
        """The folder of the cell's search, an ordinary one of `lowcal sweep`."""
        return self.group(cell.recipe) / "-".join(filter(None, [cell.method, cell.folder_variant, "search"]))

    def group(self, recipe: str) -> Path:
        """The folder of all runs of a recipe."""
        return self.out / f"{recipe}-{self.scale}{'-synthetic' * self.is_synthetic(recipe)}"

    def folder(self, cell: Cell, seed: int) -> Path:
        """The run folder of a cell with `seed`."""
        return self.group(cell.recipe) / Arm(cell.method, seed, cell.folder_variant).folder

    def seeds(self, recipe: str, count: int) -> range:
        """The seeds of `count` runs of a recipe."""
        first = self.base(recipe).seed
        return range(first, first + count)

    def is_finished(self, cell: Cell, seed: int) -> bool:
        """Whether the cell's run with `seed` is finished."""
        folder = self.folder(cell, seed)
        return RunFolder.holds_run(folder) and RunFolder(folder).read_summary() is not None

    def epochs_done(self, cell: Cell, seed: int) -> int:
        """The epochs that the cell's run with `seed` has finished."""
        folder = self.folder(cell, seed)
        return len(RunFolder(folder).read_epochs()) if RunFolder.holds_run(folder) else 0

    def runs(self, cell: Cell, count: int) -> list[RunData]:
        """The cell's finished runs with the first `count` seeds."""
        seeds = [seed for seed in self.seeds(cell.recipe, count) if self.is_finished(cell, seed)]
        return [read_run(self.folder(cell, seed)) for seed in seeds]

    def missing(self, cells: Iterable[Cell], count: int) -> list[tuple[Cell, int]]:
        """The cells of which the run with a seed is not finished, with the seed: by recipe, then by seed."""
        known = list(cells)
        return [
            (cell, seed)
            for recipe in dict.fromkeys(cell.recipe for cell in known)
            for seed in self.seeds(recipe, count)
            for cell in known
            if cell.recipe == recipe and not self.is_finished(cell, seed)
        ]

    def refuse_others(self, cells: Iterable[Cell], count: int) -> None:
        """Refuse a folder that is something else, of another version, or has a cell's run of another recipe.

        Raises:
            LowcalError: it is.
        """
        mark = self.out / MARK
        if not mark.exists():
            refuse_used(self.out, "a results folder of lowcal reproduce")
            return
        version = read_json(mark).get("lowcal")
        if version != lowcal.__version__:
            raise LowcalError(
                f"{self.out} holds results of lowcal {version}, this is {lowcal.__version__}; "
                "go on with that version or choose another --out"
            )
        for cell in cells:
            for seed in self.seeds(cell.recipe, count):
                folder = self.folder(cell, seed)
                if RunFolder.holds_run(folder):
                    refuse_another_recipe(folder, replace(self.recipe(cell), seed=seed))

    def begin(self) -> None:
        """Make the folder a results folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.out / MARK).exists():
            write_json(self.out / MARK, {"format": FORMAT, "lowcal": lowcal.__version__})

    def note_turns(self, recipe: str, folders: Sequence[str]) -> None:
        """Write down that these runs of `recipe` are trained in turn, in one process."""
        path = self.group(recipe) / TURNS
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "together": [*self.turns(recipe), list(folders)]})

    def turns(self, recipe: str) -> list[list[str]]:
        """The runs of `recipe` that were trained in turn, so that a drift of the machine affected all of them."""
        path = self.group(recipe) / TURNS
        return read_json(path)["together"] if path.exists() else []

    def file_name(self, table: str) -> str:
        """The name of the files that a table is written to, without the suffix."""
        return "-".join([table, self.scale, *(["set", digest(self.settings)] if self.settings else [])])

    def marks(self, recipes: Iterable[str]) -> str:
        """What every table says that differs from the published experiment; "" for nothing."""
        parts = [] if self.scale == "full" else [f"scale {self.scale}"]
        parts += [f"--set {setting}" for setting in self.settings]
        parts += ["synthetic images"] * any(map(self.is_synthetic, recipes))
        return ", ".join(parts)

    def size_notes(self, recipes: Iterable[str]) -> list[str]:
        """What each recipe is at this scale, as sentences; none for the full one."""
        return [f"{name}: {describe_size(self.base(name))}" for name in recipes] if self.scale != "full" else []


def image_folder(dataset: str, data_dir: Path | None) -> Path | None:
    """Where in `data_dir` the images of `dataset` are: its folder of that name, else all of it; None: not there.

    A folder that holds other data sets under their names holds no others.
    """
    if data_dir is None or not data_dir.is_dir():
        return data_dir
    if (data_dir / dataset).is_dir():
        return data_dir / dataset
    return None if any((data_dir / other).is_dir() for other in CLASSES) else data_dir


def scaled(recipe: Recipe, sizes: Mapping[str, Any], *, synthetic: bool) -> dict[str, Any]:
    """The settings that bring `recipe` to the `sizes` of a scale, with synthetic images if so wanted.

    The learning-rate schedule is compressed into the epochs, and the epochs between decays of the local step and
    between removals of channels shrink with them, to one at least. Of real images there are at least one of each
    class for testing and `EACH_CLASS` for training.
    """
    classes = CLASSES[recipe.data.name]
    least = (0, 0) if synthetic else (EACH_CLASS * classes, classes)

    def shorter(epochs: int) -> int:
        return max(1, round(epochs * Fraction(sizes["epochs"])))

    settings = {
        "epochs": shorter(recipe.epochs),
        "lr_schedule.epochs": recipe.epochs,
        "batch": max(2, round(recipe.batch.size * Fraction(sizes["batch"]))),
        "local.decay_every": shorter(recipe.local.decay_every),
        "prune.every": shorter(recipe.prune.every),
        "model.width": sizes["width"],
        "data.train_images": max(sizes["train_images"], least[0]),
        "data.test_images": max(sizes["test_images"], least[1]),
    }
    if synthetic:
        settings |= {"data.name": "synthetic", "data.classes": min(classes, sizes["classes"])}
    if recipe.data.name == "imagenet":
        settings["data.image_size"] = sizes["image_size"]
    return settings


def describe_size(recipe: Recipe) -> str:
    """The size of a recipe's runs in words."""
    data, planned = recipe.data, recipe.lr_schedule.epochs
    kind = "synthetic training images" if data.name == "synthetic" else "training images"
    words = [
        f"width {recipe.model.width}" if recipe.model.width else "",
        f"{data.image_size}x{data.image_size} pixels" if data.image_size else "",
        f"{data.train_images or 'all'} {kind}",
        f"{data.classes} classes" if data.classes else "",
        f"batch {recipe.batch.size}",
        f"{recipe.epochs} epochs" + ("" if planned in (None, recipe.epochs) else f" for {planned}"),
    ]
    return ", ".join(filter(None, words))
