"""The settings that a sweep searches, each over a list of values or a range of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

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

if TYPE_CHECKING:
    from optuna import Trial

HOW = "write key=low:high, key=low:high:log or key=value,value,..."


@dataclass(frozen=True)
class Search:
    """A setting to search.

    Attributes:
        key: the setting.
        points: the values of a list, or the two ends of a range; a range of whole numbers has whole ends.
        kind: "log" is a range on a logarithmic scale.
    """

    key: str
    points: tuple[Any, ...]
    kind: Literal["list", "range", "log"] = "list"

    def suggest(self, trial: Trial) -> Any:
        """The value that Optuna chooses for `trial`."""
        if self.kind == "list":
            labels = [label(value) for value in self.points]
            return self.points[labels.index(trial.suggest_categorical(self.key, labels))]
        low, high = self.points
        suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
        return suggest(self.key, low, high, log=self.kind == "log")

    def __contains__(self, value: Any) -> bool:
        if self.kind == "list":
            return any(type(value) is type(point) and value == point for point in self.points)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.points[0] <= value <= self.points[1]

    def __str__(self) -> str:
        points = map(show_value, self.points)
        return f"{self.key}={(',' if self.kind == 'list' else ':').join(points)}{':log' * (self.kind == 'log')}"


def label(value: Any) -> Any:
    """A value as Optuna stores it: a plain value as it is, any other as its text."""
    return value if value is None or isinstance(value, bool | int | float | str) else show_value(value)


def parse_search(text: str) -> Search:
    """The search that `text` describes, as in `local.lr=1e-4:1e-2:log` or `local.schedule.shift=1,2,4`.

    Raises:
        LowcalError: the setting is unknown, or `text` is neither a range nor a list of two or more values.
    """
    key, _, what = (part.strip() for part in text.partition("="))
    if not key or not what:
        raise LowcalError(f"--search {text}: must say what to try; {HOW}")
    types = setting_types(key)
    if not types:
        raise LowcalError(f"--search {text}: '{key}' is a section; search one of its settings")
    if key == "seed":
        raise LowcalError(f"--search {text}: seeds are repetitions, not a setting; give their number by --seeds")
    if ":" in what and not set(what) & set(",[]{}'\""):
        return _range(text, key, what.split(":"), types)
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
    return Search(key, tuple(values))


def _range(text: str, key: str, parts: Sequence[str], types: frozenset[type]) -> Search:
    if not types & {int, float}:
        raise LowcalError(f"--search {text}: '{key}' is no number, so it has no range; write {key}=value,value,...")
    is_log = len(parts) == 3 and parts[2].strip() == "log"
    if len(parts) != 2 and not is_log:
        raise LowcalError(f"--search {text}: is no range; {HOW}")
    low, high = (_number(text, part) for part in parts[:2])
    if float not in types and not (isinstance(low, int) and isinstance(high, int)):
        raise LowcalError(f"--search {text}: '{key}' is a whole number, so both ends must be; as in {key}=1:8")
    if not low < high:
        raise LowcalError(f"--search {text}: the range is empty; its low end must be below its high end")
    if is_log and low <= 0:
        raise LowcalError(f"--search {text}: a logarithmic range must begin above 0; raise its low end or omit :log")
    ends = (float(low), float(high)) if float in types else (low, high)
    return Search(key, ends, "log" if is_log else "range")


def _number(text: str, part: str) -> float:
    try:
        value = parse_value(part)
    except (yaml.YAMLError, ValueError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LowcalError(f"--search {text}: '{part.strip()}' is no number; {HOW}")
    return value


def base_recipe(recipe: Recipe, settings: Sequence[str], searches: Sequence[Search]) -> Recipe:
    """The recipe with `settings` (`key=value`) and the first point of each search.

    Raises:
        LowcalError: a setting or a point is refused, or one setting is searched twice, or both set and searched.
    """
    keys = [search.key for search in searches]
    for key in keys:
        if keys.count(key) > 1:
            raise LowcalError(f"'{key}' is searched twice; give one --search for it")
        if key in {parse_setting(setting)[0] for setting in settings}:
            raise LowcalError(f"'{key}' is both set and searched; leave out its --set or its --search")
    base = apply_settings(recipe, settings, {search.key: search.points[0] for search in searches})
    list(variants(base, searches))  # refuses a point before anything runs
    return base


def variants(base: Recipe, searches: Sequence[Search]) -> Iterator[tuple[str, Recipe]]:
    """`base` with one search at a time at each of its other points: the setting as `key=value`, and the recipe."""
    for search in searches:
        for point in search.points[1:]:
            yield f"{search.key}={show_value(point)}", apply_settings(base, [], {search.key: point})


def own_point(recipe: Recipe, searches: Sequence[Search]) -> dict[str, Any] | None:
    """The values of `recipe` for the searched settings; None if a search does not include the recipe's value."""
    point = {}
    for search in searches:
        value = value_of(recipe, search.key)
        if value not in search:
            return None
        point[search.key] = value
    return point


def grid(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """Every combination of the searches' values; the last search changes fastest.

    Raises:
        LowcalError: one of them is a range.
    """
    for search in searches:
        if search.kind != "list":
            raise LowcalError(f"--search {search}: a grid needs a list of values; write {search.key}=value,value,...")
    keys = [search.key for search in searches]
    return [dict(zip(keys, point, strict=True)) for point in product(*(search.points for search in searches))]


def refuse_unused(searches: Sequence[Search], method: str) -> None:
    """Refuse a search of another method's settings: all its trials would train the same run."""
    own = find_method(method).section
    others = {known.section for known in METHODS.values()} - ({own} if method != "sgd" else set())
    for search in searches:
        if search.key.partition(".")[0] in others:
            raise LowcalError(f"--search {search}: changes nothing for '{method}'; choose another --method or setting")
