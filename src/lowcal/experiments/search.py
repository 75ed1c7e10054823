"""What a sweep searches: settings of a recipe, each over a list of values or a range of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from lowcal.errors import LowcalError
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import (
    apply_settings,
    parse_setting,
    parse_value,
    setting_types,
    show_value,
    value_of,
)
from lowcal.methods import METHODS, find_method

HOW = "write key=low:high, key=low:high:log or key=value,value,..."


@dataclass(frozen=True)
class Values:
    """A setting that takes one of a few values, each as YAML gives it."""

    key: str
    values: tuple[Any, ...]

    @property
    def points(self) -> tuple[Any, ...]:
        """The values that a recipe must accept for the whole search to be possible."""
        return self.values

    def __contains__(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return f"{self.key}={','.join(map(show_value, self.values))}"


@dataclass(frozen=True)
class Range:
    """A setting that takes a number from `low` to `high`, both included; `log`: evenly on a logarithmic scale."""

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def points(self) -> tuple[Any, ...]:
        """The values that a recipe must accept for the whole search to be possible."""
        return self.low, self.high

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.key}={show_value(self.low)}:{show_value(self.high)}{':log' if self.log else ''}"


Search = Values | Range


def parse_search(text: str) -> Search:
    """The search that `text` describes, as in `local.lr=1e-4:1e-2:log` or `local.schedule.shift=1,2,4`.

    Raises:
        LowcalError: an unknown setting (with the nearest known one), a range that is empty, not of numbers, or
            logarithmic from zero or below, fewer than two values, a value given twice.
    """
    key, equals, what = text.partition("=")
    key, what = key.strip(), what.strip()
    if not equals or not key or not what:
        raise LowcalError(f"--search {text}: must say what to try; {HOW}")
    types = setting_types(key)
    if not types:
        raise LowcalError(f"--search {text}: '{key}' is a section; search one of its settings")
    if key == "seed":
        raise LowcalError(
            f"--search {text}: seeds are repetitions, not a setting to choose; give their number by --seeds"
        )
    ends = what.split(":")
    if len(ends) > 1 and not set(what) & set(",[]{}'\""):
        return _range(text, key, ends, types)
    return _values(text, key, what)


def base_recipe(recipe: Recipe, settings: Sequence[str], searches: Sequence[Search]) -> Recipe:
    """The recipe that a sweep starts from: with `settings` (`key=value`) and the first point of each search.

    Every point of every search is tried on it, so that what the recipe refuses is found before anything runs.

    Raises:
        LowcalError: a setting or a value is refused, or one setting is searched twice, or both set and searched.
    """
    keys = [search.key for search in searches]
    for key in keys:
        if keys.count(key) > 1:
            raise LowcalError(f"'{key}' is searched twice; give one --search for it")
        if key in {parse_setting(setting)[0] for setting in settings}:
            raise LowcalError(f"'{key}' is both set and searched; leave out its --set or its --search")
    base = apply_settings(recipe, settings, {search.key: search.points[0] for search in searches})
    for _ in variants(base, searches):
        pass
    return base


def variants(base: Recipe, searches: Sequence[Search]) -> Iterator[tuple[str, Recipe]]:
    """`base` with one search at a time moved to each of its other points: the setting as 'key=value', the recipe."""
    for search in searches:
        for point in search.points[1:]:
            yield f"{search.key}={show_value(point)}", apply_settings(base, [], {search.key: point})


def own_point(recipe: Recipe, searches: Sequence[Search]) -> dict[str, Any] | None:
    """The values that `recipe` itself has for the searched settings; None if one of them is not among the searched."""
    point = {}
    for search in searches:
        value = value_of(recipe, search.key)
        if value not in search:
            return None
        point[search.key] = value
    return point


def grid(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """Every combination of the searches' values, the last search's changing fastest.

    Raises:
        LowcalError: one of them is a range.
    """
    lists = []
    for search in searches:
        if isinstance(search, Range):
            raise LowcalError(f"--search {search}: a grid needs a list of values; write {search.key}=value,value,...")
        lists.append([(search.key, value) for value in search.values])
    return [dict(point) for point in product(*lists)]


def refuse_unused(searches: Sequence[Search], method: str) -> None:
    """Refuse a search of another method's settings, which would train the same runs over and over."""
    own = find_method(method).section
    for search in searches:
        section = search.key.partition(".")[0]
        of_methods = {known.section for known in METHODS.values()}
        unused = section in of_methods and (section != own or method == "sgd")
        if unused:
            raise LowcalError(f"--search {search}: changes nothing for '{method}'; choose another --method or setting")


def decode(searches: Sequence[Search], labels: Mapping[str, Any]) -> dict[str, Any]:
    """The settings' values for what a sampler chose: `label` of a list's value, or a number of a range."""
    chosen: dict[str, Any] = {}
    for search in searches:
        if isinstance(search, Values):
            by_label = {label(value): value for value in search.values}
            chosen[search.key] = by_label[labels[search.key]]
        else:
            chosen[search.key] = labels[search.key]
    return chosen


def label(value: Any) -> Any:
    """A value as a sampler and a table know it: itself if it is plain, else its text."""
    return value if value is None or isinstance(value, bool | int | float | str) else show_value(value)


def _range(text: str, key: str, ends: list[str], types: frozenset[type]) -> Range:
    if not types & {int, float}:
        raise LowcalError(f"--search {text}: '{key}' is no number, so it has no range; write {key}=value,value,...")
    log = len(ends) == 3 and ends[2].strip() == "log"
    if len(ends) > 3 or (len(ends) == 3 and not log):
        raise LowcalError(f"--search {text}: is no range; {HOW}")
    low, high = (_number(text, end) for end in ends[:2])
    whole = float not in types
    if whole and not (isinstance(low, int) and isinstance(high, int)):
        raise LowcalError(f"--search {text}: '{key}' is a whole number, so both ends must be; as in {key}=1:8")
    if not low < high:
        raise LowcalError(f"--search {text}: the range is empty; its low end must be below its high end")
    if log and low <= 0:
        raise LowcalError(
            f"--search {text}: a logarithmic range must begin above 0; raise its low end or leave out :log"
        )
    return Range(key, low if whole else float(low), high if whole else float(high), log, whole)


def _number(text: str, end: str) -> float:
    try:
        value = parse_value(end)
    except (yaml.YAMLError, ValueError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LowcalError(f"--search {text}: '{end.strip()}' is no number; {HOW}")
    return value


def _values(text: str, key: str, what: str) -> Values:
    try:
        values = parse_value(f"[{what}]")
    except (yaml.YAMLError, ValueError):
        raise LowcalError(f"--search {text}: the values are not valid YAML; {HOW}") from None
    if len(values) < 2:
        raise LowcalError(f"--search {text}: one value is no search; give two or more, or use --set")
    texts = [show_value(value) for value in values]
    for one in texts:
        if texts.count(one) > 1:
            raise LowcalError(f"--search {text}: {one} is there twice; give each value once")
    return Values(key, tuple(values))
