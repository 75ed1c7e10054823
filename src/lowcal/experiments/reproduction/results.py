"""The results folder: one run folder for each cell and seed, whichever table asked for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lowcal
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm
from lowcal.experiments.folders import refuse_another_recipe, refuse_used
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_files import apply_settings, load_recipe
from lowcal.experiments.reproduction.cells import Cell
from lowcal.experiments.reproduction.found import Found, read_found
from lowcal.experiments.reproduction.scales import Scale, image_folder, is_stand_in, scaled
from lowcal.files import FORMAT, read_json, write_json
from lowcal.report.runs import RunData, read_run
from lowcal.training.record import RunFolder

MARK = "reproduce.json"
TURNS = "turns.json"


@dataclass(frozen=True)
class State:
    """How far a cell's run with one seed is."""

    finished: int
    epochs: int
    is_complete: bool


class Results:
    """The results folder `out` at one scale, with the user's settings.

    A run lies in RECIPE-SCALE/METHOD-VARIANT-seedN; the variant of a run that the user's settings change ends with
    their digest.
    """

    def __init__(self, out: Path, scale: Scale, *, settings: Sequence[str] = (), data_dir: Path | None = None) -> None:
        self.out = out
        self.scale = scale
        self.settings = tuple(settings)
        self.data_dir = data_dir
        self._bases: dict[str, Recipe] = {}
        self._found: dict[Cell, Found] = {}
        self._synthetic: dict[str, bool] = {}

    def base(self, name: str) -> Recipe:
        """The packaged recipe at this scale, with those of the user's settings that are no method's."""
        if name not in self._bases:
            recipe = load_recipe(name)
            recipe = scaled(recipe, self.scale, synthetic=self.is_synthetic(name))
            self._bases[name] = apply_settings(recipe, Cell(name, "sgd").own(self.settings))
        return self._bases[name]

    def is_synthetic(self, name: str) -> bool:
        """Whether synthetic images stand in for those of the recipe `name`."""
        if name not in self._synthetic:
            self._synthetic[name] = is_stand_in(load_recipe(name), self.scale, self.data_dir)
        return self._synthetic[name]

    def images(self, name: str) -> Path | None:
        """The folder of the recipe's images; None where they are synthetic or in the cache folder.

        Raises:
            LowcalError: there must be one, and is none.
        """
        dataset = self.base(name).data.name
        if dataset == "synthetic":
            return None
        folder = image_folder(dataset, self.data_dir)
        if folder is None and dataset == "imagenet":
            raise LowcalError(
                f"{name} at scale {self.scale.name} needs ImageNet: give its folder with --data-dir, choose other "
                "--cells, or a smaller --scale, where synthetic images stand in"
            )
        if folder is None and self.data_dir is not None:
            raise LowcalError(f"--data-dir {self.data_dir} has no folder '{dataset}', which {name} needs; put it there")
        return folder

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe of a cell's runs, but for the seed; before its search, the one where the search begins."""
        return apply_settings(self.base(cell.recipe), [*cell.all_settings(self.settings), *self.found_settings(cell)])

    def searches(self, cell: Cell) -> tuple[str, ...]:
        """What must be searched before the cell can be trained; none where the user's settings say it all."""
        return cell.open_searches(self.settings)

    def search_folder(self, cell: Cell) -> Path:
        """The folder of the cell's search, an ordinary one of `lowcal sweep`."""
        return self.group(cell.recipe) / "-".join(filter(None, [cell.method, self._variant(cell), "search"]))

    def found(self, cell: Cell) -> Found | None:
        """What the cell's search has found; None if there is nothing to search or it is not finished."""
        searches = self.searches(cell)
        if searches and cell not in self._found:
            found = read_found(self.search_folder(cell), searches, self.scale.trials)
            if found is None:
                return None
            self._found[cell] = found
        return self._found.get(cell)

    def found_settings(self, cell: Cell) -> tuple[str, ...]:
        """The same as settings; empty for None."""
        found = self.found(cell)
        return found.settings if found else ()

    def arm(self, cell: Cell, seed: int) -> Arm:
        """The cell's run with `seed`, as progress shows it."""
        return Arm(cell.method, seed, self._variant(cell), self.recipe(cell).epochs)

    def _variant(self, cell: Cell) -> str:
        own = cell.own(self.settings)
        return "-".join(filter(None, [cell.variant, f"set-{_digest(own)}" if own else ""]))

    def group(self, recipe: str) -> Path:
        """The folder of all runs of a recipe."""
        return self.out / "-".join([recipe, self.scale.name, *(["synthetic"] if self.is_synthetic(recipe) else [])])

    def folder(self, cell: Cell, seed: int) -> Path:
        """The run folder of a cell with `seed`."""
        return self.group(cell.recipe) / self.arm(cell, seed).folder

    def state(self, cell: Cell, seed: int) -> State:
        """How far that run is."""
        folder, epochs = self.folder(cell, seed), self.recipe(cell).epochs
        if not RunFolder.holds_run(folder):
            return State(0, epochs, is_complete=False)
        run = RunFolder(folder)
        return State(len(run.read_epochs()), epochs, is_complete=run.read_summary() is not None)

    def complete(self, cell: Cell, seeds: int) -> list[RunData]:
        """The cell's finished runs with the first `seeds` seeds."""
        first = self.recipe(cell).seed
        wanted = range(first, first + seeds)
        return [read_run(self.folder(cell, seed)) for seed in wanted if self.state(cell, seed).is_complete]

    def name(self, plan: str) -> str:
        """The name of the files that `plan` becomes: with the scale, and what the user's settings make of it."""
        digest = f"-set-{_digest(self.settings)}" if self.settings else ""
        return f"{plan}-{self.scale.name}{digest}"

    def refuse_others(self, cells: Iterable[Cell], seeds: int) -> None:
        """Refuse a folder that is something else, is of another version, or has a cell of another recipe.

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
            recipe = self.recipe(cell)
            for seed in range(recipe.seed, recipe.seed + seeds):
                folder = self.folder(cell, seed)
                if RunFolder.holds_run(folder):
                    refuse_another_recipe(folder, recipe.model_copy(update={"seed": seed}))

    def begin(self) -> None:
        """Make the folder a results folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.out / MARK).exists():
            write_json(self.out / MARK, {"format": FORMAT, "lowcal": lowcal.__version__})

    def note_turns(self, recipe: str, folders: Sequence[str]) -> None:
        """Write down that these runs of `recipe` are trained in turn, in one process."""
        path = self.group(recipe) / TURNS
        together = [*self._turns(recipe), list(folders)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "together": together})

    def took_turns(self, recipe: str, one: str, other: str) -> bool:
        """Whether two runs of `recipe` were trained in turn, so that a drift of the machine hit both."""
        return any({one, other} <= set(folders) for folders in self._turns(recipe))

    def _turns(self, recipe: str) -> list[list[str]]:
        path = self.group(recipe) / TURNS
        return read_json(path)["together"] if path.exists() else []

    @cached_property
    def mark(self) -> str:
        """What every table says of a scale that is not the published one, or of settings; "" for nothing."""
        parts = [] if self.scale.name == "full" else [f"scale {self.scale.name}"]
        parts += [f"--set {setting}" for setting in self.settings]
        return ", ".join(parts)

    def marks(self, recipes: Iterable[str]) -> str:
        """`mark`, and whether any of `recipes` has synthetic images."""
        synthetic = "synthetic images" if any(self.is_synthetic(recipe) for recipe in recipes) else ""
        return ", ".join(filter(None, [self.mark, synthetic]))

    def sizes(self, recipes: Iterable[str]) -> list[str]:
        """In words, what each recipe is at this scale."""
        return [f"{name}: {describe_size(self.base(name))}" for name in recipes] if self.scale.name != "full" else []


def describe_size(recipe: Recipe) -> str:
    """The size of a recipe's runs in words."""
    data, words = recipe.data, []
    if recipe.model.width is not None:
        words.append(f"width {recipe.model.width}")
    if data.image_size is not None:
        words.append(f"{data.image_size}x{data.image_size} pixels")
    kind = "synthetic training images" if data.name == "synthetic" else "training images"
    words.append(f"{data.train_images} {kind}" if data.train_images else f"all {kind}")
    if data.classes is not None:
        words.append(f"{data.classes} classes")
    words.append(f"batch {recipe.batch.size}")
    planned = recipe.lr_schedule.epochs
    words.append(f"{recipe.epochs} epochs" + ("" if planned in (None, recipe.epochs) else f" for {planned}"))
    return ", ".join(words)


def _digest(settings: Sequence[str]) -> str:
    """Eight hexadecimal digits that tell settings apart, in whatever order they are given."""
    text = "\n".join(sorted("".join(setting.split()) for setting in settings))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
