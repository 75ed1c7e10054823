"""Recipes to and from text: packaged names, files, `--set key=value`, and the run folder's copy.

Between text and recipe stand plain values by dotted keys, such as {"local.schedule.name": "fixed"}.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lowcal.errors import LowcalError, nearest
from lowcal.experiments.recipe import BatchSettings, Recipe
from lowcal.report.headline import title
from lowcal.settings import SettingError, allowed, annotations_of, plain_types

MOST_CHANGES = 6  # that a label names
UNSAID = ("name", "label", "seed")  # settings whose change leaves a recipe what its label says

# Other programs' options whose names are not those of settings, or are those of several.
_OPTIONS = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "batch": "batch",
    "batch_size": "batch",
    "model": "model.name",
    "arch": "model.name",
    "dataset": "data.name",
    "data": "data.name",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number, as YAML 1.2 does and PyYAML does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def recipe_names() -> list[str]:
    """The names of the packaged recipes."""
    folder = resources.files("lowcal.experiments") / "recipes"
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of a packaged name (`digits`) or of a YAML file (`mine.yaml`, `folder/mine.yaml`).

    Raises:
        LowcalError: an unknown name, a file that cannot be read or is no recipe, a wrong setting.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise LowcalError(f"recipe file {name_or_path} does not exist: check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
            message = f"recipe file {name_or_path} cannot be read ({reason}): give a YAML file"
            raise LowcalError(message) from None
        return parse_recipe(text, name_or_path)
    if name_or_path not in recipe_names():
        raise LowcalError(f"unknown recipe '{name_or_path}'{nearest(name_or_path, recipe_names())}")
    return _packaged(name_or_path)


@cache
def _packaged(name: str) -> Recipe:
    return parse_recipe((resources.files("lowcal.experiments") / "recipes" / f"{name}.yaml").read_text("utf-8"), name)


def parse_recipe(text: str, source: str) -> Recipe:
    """The recipe that YAML `text` holds; errors name `source`."""
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        message = f"recipe {source} is not valid YAML{_place(error)}: correct or replace the file"
        raise LowcalError(message) from None
    if not isinstance(data, dict):
        raise LowcalError(f"recipe {source} holds no settings: write 'key: value' lines as in the packaged recipes")
    try:
        return recipe_of(data)
    except LowcalError as error:
        raise LowcalError(f"recipe {source}: {error}") from None


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """The recipe that nested plain values describe, as `as_dict` gives them."""
    recipe: Recipe = _build(Recipe, dict(_settings_in(data)), "")
    return recipe if recipe.label else replace(recipe, label=title(as_dict(recipe)))


def as_dict(section: Any) -> dict[str, Any]:
    """A recipe, or a section of one, as nested plain values, every setting spelled out."""
    values = {field.name: getattr(section, field.name) for field in fields(section)}
    return {name: as_dict(value) if is_dataclass(value) else value for name, value in values.items()}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every setting spelled out; `parse_recipe` gives the same recipe back.

    A batch of which nothing but the size is set is written as a plain number.
    """
    data = as_dict(recipe)
    if recipe.batch == BatchSettings(size=recipe.batch.size):
        data["batch"] = recipe.batch.size
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def apply_settings(recipe: Recipe, settings: Iterable[str], values: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with single settings changed, each written `a.b=value` with the value in YAML.

    A label says what the recipe was before, so a changed recipe has one that names the changes: those against the
    packaged recipe of its name, if there is one. A label that is among the settings is kept.

    Args:
        values: further settings by their keys, as values; all are checked together.

    Raises:
        LowcalError: an unknown key (with the nearest known one), a wrong type, a value out of range.
    """
    given = _flat(recipe)
    for key, value in [*map(parse_setting, settings), *(values or {}).items()]:
        given |= _settings_in({key: value})
    changed = recipe_of(given)
    if changed.label != recipe.label or not _changes(recipe, changed):
        return changed
    before = _packaged(recipe.name) if recipe.name in recipe_names() else recipe
    changes = {key: here for key, (_, here) in _changes(before, changed).items()}
    named = [f"{key}={_show(value)}" for key, value in list(changes.items())[:MOST_CHANGES]]
    named += [f"and {len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
    # A user's recipe that is changed once more is compared with the changed one, whose label names the first changes.
    start = f"{recipe.name} with "
    so_far = f"{before.label}, " if before.label.startswith(start) else start
    return replace(changed, label=so_far + ", ".join(named) if changes else before.label)


def parse_setting(setting: str) -> tuple[str, Any]:
    """The key and the value of a setting that is written `a.b=value`."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise LowcalError(f"--set {setting}: must read key=value, as in --set epochs=5")
    try:
        return key, parse_value(text)
    except (yaml.YAMLError, ValueError):
        message = f"--set {setting}: the value is not valid YAML; quote it, as in --set 'k={{1: 2}}'"
        raise LowcalError(message) from None


def parse_value(text: str) -> Any:
    """The value that YAML `text` holds; yaml.YAMLError or ValueError if it holds none."""
    return yaml.load(text, _Loader)


def show_value(value: Any) -> str:
    """A value as a person would write it in YAML, on one line."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    except yaml.representer.RepresenterError:  # a value that comes from Python, not from text
        return repr(value)
    return text.removesuffix("\n").removesuffix("...").strip()


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys whose values differ, each as 'epochs (5 there, 30 here)'; a label's wording is no difference."""
    changes = _changes(old, new, but_for=("label",))
    return [f"{key} ({_show(there)} there, {_show(here)} here)" for key, (there, here) in changes.items()]


def plain_settings(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The value of every setting by its dotted key; null, a list or a mapping as YAML text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else show_value(value)
        for key, value in _flat(recipe).items()
    }


def setting_types(key: str) -> frozenset[type]:
    """The plain types that the value of the setting `key` may have, such as {int, NoneType}; a section has none.

    Raises:
        LowcalError: there is no such setting.
    """
    annotation = _annotation(_full(key))
    return frozenset() if _is_section(annotation) else plain_types(annotation)


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of the setting `key`."""
    return _flat(recipe)[_full(key)]


def setting_meant_by(name: str) -> str | None:
    """The key that other programs' option `name` would set (`lr` for optimizer.lr); None where there is none."""
    if name in _OPTIONS:
        return _OPTIONS[name]
    found = [key for key in _keys() if key == name] or [key for key in _keys() if key.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _changes(old: Recipe, new: Recipe, but_for: tuple[str, ...] = UNSAID) -> dict[str, tuple[Any, Any]]:
    """The settings whose values differ, by their keys as a person would write them, with both values."""
    before, after = _flat(old), _flat(new)
    changed = [key for key in after if key not in but_for and before[key] != after[key]]
    return {_written(key): (before[key], after[key]) for key in changed}


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The value of every setting by its dotted key."""
    return dict(_settings_in(as_dict(recipe)))


def _build(section: Any, given: Mapping[str, Any], prefix: str) -> Any:
    """The section whose settings `given` holds by their dotted keys, which begin with `prefix`."""
    values = {}
    for field in fields(section):
        key, annotation = prefix + field.name, annotations_of(section)[field.name]
        if _is_section(annotation):
            values[field.name] = _build(annotation, given, f"{key}.")
        elif key in given:
            values[field.name] = given[key]
        elif field.default is MISSING:
            raise LowcalError(f"the setting '{_written(key)}' is missing: must be {allowed(annotation)}")
    try:
        return section(**values)
    except SettingError as error:
        key = _written(f"{prefix}{error.name}")
        raise LowcalError(f"{key}={_show(error.value)}: must be {error.allowed}") from None


def _settings_in(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in nested `data` by their dotted keys, with their values."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        section = _annotation(key)
        if not _is_section(section):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _settings_in(value, f"{key}.")
        elif _full(key) != key:
            yield _full(key), value
        else:
            choices = ", ".join(f"{key}.{inner}" for inner in annotations_of(section))
            raise LowcalError(f"{key}={_show(value)}: is a section; set one of {choices}")


def _annotation(key: str) -> Any:
    """The annotation of the setting, or of the section, with the dotted `key`."""
    if key not in _known():
        raise LowcalError(f"unknown setting '{key}'{_nearest_key(key)}")
    return _known()[key]


@cache
def _known() -> dict[str, Any]:
    """The annotations of all sections and settings by their dotted keys."""

    def walk(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, annotation in annotations_of(section).items():
            yield f"{prefix}{name}", annotation
            if _is_section(annotation):
                yield from walk(annotation, f"{prefix}{name}.")

    return dict(walk(Recipe, ""))


def _is_section(annotation: Any) -> bool:
    return is_dataclass(annotation)


def _keys() -> list[str]:
    return [key for key, annotation in _known().items() if not _is_section(annotation)]


def _full(key: str) -> str:
    """The key of the setting for which a plain value as the section `key` stands, or `key`."""
    section = _annotation(key)
    return f"{key}.{section.short}" if hasattr(section, "short") else key


def _written(key: str) -> str:
    """The key of a setting, or that of the section for which its plain value stands."""
    section = key.rpartition(".")[0]
    return section if section and _full(section) == key else key


def _nearest_key(key: str) -> str:
    """The remedy for an unknown key: the nearest full key, also where only its last part was given."""
    known = _keys()
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not match:
        last = key.rpartition(".")[2]
        lasts = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.6)
        match = [k for k in known if lasts and k.rpartition(".")[2] == lasts[0]]
    if match:
        return "; did you mean " + " or ".join(f"'{m}'" for m in match) + "?"
    return nearest(key, annotations_of(Recipe))


def _show(value: Any) -> str:
    """As `show_value`, but not too long."""
    text = show_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark is not None else ""
