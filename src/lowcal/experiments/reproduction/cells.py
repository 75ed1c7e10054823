"""A cell: one training that a table or figure needs. Several tables may need the same one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lowcal.errors import LowcalError, nearest
from lowcal.methods import METHODS, find_method

_SECTIONS = {method.section for method in METHODS.values()}


@dataclass(frozen=True)
class Cell:
    """A method on a network and data set, with every setting but the seed.

    Attributes:
        recipe: the packaged recipe's name.
        method: the method's name.
        variant: names what differs from the recipe; "" for nothing.
        settings: what differs, each as `key=value`.
        defaults: the same, but for settings that the user's own take the place of.
        searches: settings that are found by a search, each as `lowcal sweep --search` takes it, unless they are given.
    """

    recipe: str
    method: str
    variant: str = ""
    settings: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """What `--cells` knows it by: recipe/method or recipe/method-variant."""
        return f"{self.recipe}/{self.name}"

    @property
    def name(self) -> str:
        """The method, with the variant if there is one."""
        return f"{self.method}-{self.variant}" if self.variant else self.method

    def own(self, settings: Sequence[str]) -> tuple[str, ...]:
        """Those of the user's `settings` that this cell's method looks at: `local.lr` leaves sgd as it is."""
        sections = _SECTIONS - ({find_method(self.method).section} if self.method != "sgd" else set())
        return tuple(s for s in settings if re.split(r"[.=]", s.strip(), maxsplit=1)[0] not in sections)

    def all_settings(self, settings: Sequence[str]) -> list[str]:
        """The user's settings as far as they are its own, and the cell's."""
        given = self.own(settings)
        return [*given, *_without(self.defaults, given), *self.settings]

    def open_searches(self, settings: Sequence[str]) -> tuple[str, ...]:
        """Its searches but for those of settings that the user gives."""
        return tuple(_without(self.searches, self.own(settings)))


def _without(settings: Iterable[str], given: Sequence[str]) -> list[str]:
    """Those of `settings` whose keys are not among those of `given`."""
    keys = {setting.partition("=")[0].strip() for setting in given}
    return [setting for setting in settings if setting.partition("=")[0] not in keys]


def choose(cells: Iterable[Cell], patterns: str | None) -> list[Cell]:
    """The cells that one of the `patterns` fits, separated by commas; all with None.

    A pattern is a cell's id, or one side of it (the recipe, or what follows it), and may hold * and ?.

    Raises:
        LowcalError: a pattern fits no cell.
    """
    known = list(cells)
    if patterns is None:
        return known
    chosen: set[Cell] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        found = [cell for cell in known if any(fnmatchcase(n, pattern) for n in (cell.id, cell.recipe, cell.name))]
        if not found:
            names = {name for cell in known for name in (cell.id, cell.recipe, cell.name)}
            hint = nearest(pattern, names)
            if not hint.startswith("; did"):
                hint = f"; choose from {', '.join(sorted({cell.recipe for cell in known}))}, or see --dry-run"
            raise LowcalError(f"--cells {pattern}: no cell of it is called so{hint}")
        chosen.update(found)
    return [cell for cell in known if cell in chosen]
