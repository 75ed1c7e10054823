"""The paper's tables and figures as `paper.yaml` lists them: their rows, and the cells that they need."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

import yaml

from lowcal.errors import LowcalError, nearest
from lowcal.experiments.recipe import Recipe
from lowcal.methods import METHODS, find_method
from lowcal.report.runs import COMPRESSED
from lowcal.schedule import cap

GPUS = 4  # of Section 3.2


@dataclass(frozen=True)
class Cell:
    """One training that a table needs: a method on a recipe, with every setting but the seed.

    Attributes:
        recipe: the packaged recipe's name.
        variant: names what differs from the recipe; "" for nothing.
        settings: what differs, with the user's settings, each as `key=value`.
        searches: settings to be searched before training, each as `lowcal sweep --search` takes it.
        digest: of the user's settings as far as they apply to the method; "" for none.
    """

    recipe: str
    method: str
    variant: str = ""
    settings: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    digest: str = ""

    @property
    def name(self) -> str:
        """The method, with the variant if there is one."""
        return f"{self.method}-{self.variant}" if self.variant else self.method

    @property
    def id(self) -> str:
        """RECIPE/NAME, by which `--cells` knows it."""
        return f"{self.recipe}/{self.name}"

    @property
    def folder_variant(self) -> str:
        """The variant in the name of a run folder, which also tells the user's settings apart."""
        return "-".join(filter(None, [self.variant, self.digest and f"set-{self.digest}"]))


@dataclass(frozen=True)
class Row:
    """A row of a table, with what the paper gives: error in percent, speed-up as a ratio; None for nothing."""

    label: str
    cell: Cell
    top1_error: float | None = None
    speedup: float | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class PaperTable:
    """A table or figure.

    Attributes:
        kind: how its rows are computed, a key of `write.KINDS`.
        cells: all that it needs, each once: those of one recipe together, sgd first.
        notes: what a reader must know.
        has_frontier: whether error against time is drawn.
        bounds: of Table 7's rows, with the published figures.
    """

    name: str
    title: str
    kind: str
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    has_frontier: bool = False
    bounds: tuple[Mapping[str, float], ...] = ()

    @property
    def recipes(self) -> list[str]:
        """The recipes of its cells."""
        return list(dict.fromkeys(cell.recipe for cell in self.cells))


@cache
def paper() -> dict[str, Any]:
    """The content of `paper.yaml`."""
    return yaml.safe_load((resources.files("lowcal.experiments.reproduce") / "paper.yaml").read_text("utf-8"))


def table_names() -> list[str]:
    """What can be reproduced, tables first."""
    return list(paper()["tables"])


def published(recipe: str, method: str) -> tuple[float | None, float | None]:
    """Top-1 error in percent and speed-up of a method with common settings (Tables 1 and 2)."""
    tables = paper()["tables"]
    rows = {**tables["table1"]["rows"], **tables["table2"]["rows"]}.get(recipe, {})
    _, error, speedup = [*rows.get(method, [method]), None, None][:3]
    return error, speedup


def make_table(name: str, base: Callable[[str], Recipe], settings: Sequence[str] = ()) -> PaperTable:
    """The table or figure called `name`, under the user's `settings`; `base` gives the recipes that cells start from.

    Raises:
        LowcalError: there is none.
    """
    if name not in paper()["tables"]:
        raise LowcalError(f"unknown table '{name}'{nearest(name, table_names())}")
    data = paper()["tables"][name]
    rows: list[Row] = []
    cells: dict[Cell, None] = {}
    for recipe, entries in data["rows"].items():
        plain = base(recipe)
        for label, (cell_name, *figures) in entries.items():
            if cell_name == COMPRESSED:
                names = {name: name for name in compressed_names(plain)}
            else:
                names = {label: cell_name}
            rows += [Row(label, make_cell(recipe, name, plain, settings), *figures) for label, name in names.items()]
        needed = [row.cell for row in rows if row.cell.recipe == recipe]
        needed += [make_cell(recipe, name, plain, settings) for name in data.get("also", [])]
        cells |= dict.fromkeys(sorted(needed, key=lambda cell: cell.name != "sgd"))
    return PaperTable(
        name,
        data["title"],
        data.get("kind", "results"),
        tuple(rows),
        tuple(cells),
        tuple(data.get("notes", [])),
        data.get("frontier", False),
        tuple(data.get("bounds", [])),
    )


def make_cell(recipe: str, name: str, base: Recipe, settings: Sequence[str] = ()) -> Cell:
    """The cell METHOD or METHOD-VARIANT of `recipe`, under those of the user's `settings` that its method uses."""
    known = values(recipe, base)
    name = name.format(**known)
    method = next(method for method in METHODS if name == method or name.startswith(f"{method}-"))
    variant = name.removeprefix(method).removeprefix("-")
    changes: dict[str, list[str]] = {"start": [], "set": [], "search": []}
    for word, value in re.findall(r"([a-z]+)(?:-([\d.]+))?", variant):
        for kind, texts in paper()["variants"][word].items():
            changes[kind] += [text.format(value=value, **known) for text in texts]
    given = own_settings(method, settings)
    keys = {setting.partition("=")[0].strip() for setting in given}
    searches = [search for search in changes["search"] if search.partition("=")[0] not in keys]
    all_settings = (*changes["start"], *given, *changes["set"])
    return Cell(recipe, method, variant, all_settings, tuple(searches), digest(given))


def values(recipe: str, base: Recipe) -> dict[str, Any]:
    """The values of the names in braces in `paper.yaml`."""
    layers = paper()["layers"].get(recipe, 1)
    most = cap(layers, 0.75)
    slope = most / base.epochs**2  # of Eq. 3 with a boundary that rises from 0 in the first epoch
    return {
        "four_batches": GPUS * base.batch.size,
        "four_lr": f"{GPUS * base.optimizer.lr:g}",
        "planned": base.lr_schedule.epochs or base.epochs,
        "layers": layers,
        "quarter": layers // 4,
        "cap": most,
        "slope": slope,
        "low": slope / 2,
        "high": slope * 16,
    }


def compressed_names(recipe: Recipe) -> list[str]:
    """The cells of SGD with its whole learning-rate schedule in fewer epochs."""
    epochs = {max(1, round(part * recipe.epochs)) for part in paper()["compressed"]} - {recipe.epochs}
    return [f"{COMPRESSED}-{count}" for count in sorted(epochs)]


def own_settings(method: str, settings: Sequence[str]) -> list[str]:
    """Those of the user's `settings` that `method` uses: `local.lr` leaves sgd as it is."""
    others = {known.section for known in METHODS.values()}
    if method != "sgd":
        others -= {find_method(method).section}
    return [setting for setting in settings if re.split(r"[.=]", setting.strip(), maxsplit=1)[0] not in others]


def digest(settings: Sequence[str]) -> str:
    """Eight hexadecimal digits that tell settings apart, in whatever order they are given; "" for none."""
    text = "\n".join(sorted("".join(setting.split()) for setting in settings))
    return hashlib.sha256(text.encode()).hexdigest()[:8] if settings else ""


def choose(cells: Iterable[Cell], patterns: str | None) -> list[Cell]:
    """The cells that match one of the `patterns`, which are separated by commas; all for None.

    A pattern is a cell's id, or one side of it (the recipe, or what follows it), and may hold * and ?.

    Raises:
        LowcalError: a pattern matches no cell.
    """
    names = {cell: (cell.id, cell.recipe, cell.name) for cell in cells}
    if patterns is None:
        return list(names)
    chosen: set[Cell] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        found = [cell for cell in names if any(fnmatchcase(name, pattern) for name in names[cell])]
        if not found:
            hint = nearest(pattern, {name for own in names.values() for name in own})
            if not hint.startswith("; did"):
                hint = f"; choose from {', '.join(sorted({cell.recipe for cell in names}))}, or see --dry-run"
            raise LowcalError(f"--cells {pattern}: no cell has this name{hint}")
        chosen.update(found)
    return [cell for cell in names if cell in chosen]
