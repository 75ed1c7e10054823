"""Recipes to and from text: packaged names, files, `--set key=value`, and the run folder's copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, reduce
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lowcal.errors import LowcalError, nearest
from lowcal.experiments.recipe import BatchSettings, Recipe, Settings
from lowcal.experiments.recipe_keys import allowed_values, as_written, known_keys, nearest_key, section_of, unknown_keys
from lowcal.report.headline import title


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number, as YAML 1.2 does and PyYAML does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


MOST_CHANGES = 6  # that a label names
UNSAID = ("name", "label", "seed")  # settings whose change leaves a recipe what its label says


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
        message = f"recipe {source} is not valid YAML{_place(error)}: mend or replace the file"
        raise LowcalError(message) from None
    if not isinstance(data, dict):
        raise LowcalError(f"recipe {source} holds no settings: write 'key: value' lines as in the packaged recipes")
    return _validate(data, f"recipe {source}: ")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every setting spelled out; `parse_recipe` gives the same recipe back.

    A batch of which nothing but the size is set is written as a plain number.
    """
    data = recipe.model_dump()
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
    data = recipe.model_dump()
    for key, value in [*map(parse_setting, settings), *(values or {}).items()]:
        _put(data, key, value)
    changed = _validate(data, "")
    if changed.label != recipe.label or not _changes(recipe, changed):
        return changed
    before = _packaged(recipe.name) if recipe.name in recipe_names() else recipe
    changes = _changes(before, changed)
    named = [f"{key}={_show(value)}" for key, value in list(changes.items())[:MOST_CHANGES]]
    named += [f"and {len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
    # Changed once more, a user's recipe is compared with the changed one, whose label names the changes so far.
    start = f"{recipe.name} with "
    so_far = f"{before.label}, " if before.label.startswith(start) else start
    label = so_far + ", ".join(named) if changes else before.label
    return changed.model_copy(update={"label": label})


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
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").strip()


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys whose values differ, each as 'epochs (5 there, 30 here)'; a label's wording is no difference."""
    left, right = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    keys = [*left, *(key for key in right if key not in left)]
    changed = [key for key in keys if left.get(key) != right.get(key) and key != "label"]
    return [
        f"{'.'.join(as_written(key.split('.')))} ({_show(left.get(key))} there, {_show(right.get(key))} here)"
        for key in changed
    ]


def _changes(old: Recipe, new: Recipe) -> dict[str, Any]:
    """What `new` has otherwise than `old`, by dotted key, as a person would write it."""
    keys = [key for key in known_keys(Recipe) if key not in UNSAID]
    values = {key: (reduce(getattr, key.split("."), old), reduce(getattr, key.split("."), new)) for key in keys}
    return {".".join(as_written(key.split("."))): there for key, (before, there) in values.items() if there != before}


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    section: Any = data
    model: type[Settings] | None = Recipe
    for part in parts:
        if model is None or part not in model.model_fields:
            raise LowcalError(f"unknown setting '{key}'{nearest_key(key)}")
        parent, section, model = section, section[part], section_of(model, part)
    if model is not None:
        if not isinstance(value, dict):
            if model.short:
                section[model.short] = value
                return
            choices = ", ".join(f"{key}.{field}" for field in model.model_fields)
            raise LowcalError(f"{key}={_show(value)}: is a section; set one of {choices}")
        for field, inner in value.items():
            _put(data, f"{key}.{field}", inner)
        return
    parent[parts[-1]] = value


def _validate(data: Mapping[str, Any], source: str) -> Recipe:
    unknown = next(unknown_keys(data, Recipe, ""), None)
    if unknown is not None:
        raise LowcalError(f"{source}unknown setting '{unknown}'{nearest_key(unknown)}")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise LowcalError(source + _line(error.errors()[0])) from None
    return recipe if recipe.label else recipe.model_copy(update={"label": title(recipe.model_dump())})


def _line(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    parts = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(as_written(parts))
    allowed = allowed_values(parts) or error["msg"].replace("Input should be", "must be")
    if error["type"] == "missing":
        return f"the setting '{key}' is missing: {allowed}"
    return f"{key}={_show(error['input'])}: {allowed}"


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(value: Any) -> str:
    """As `show_value`, but not too long."""
    text = show_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark is not None else ""
