"""The keys of a recipe: what each may be, and which was meant by one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from lowcal.errors import LowcalError, nearest
from lowcal.experiments.recipe import Recipe, Settings

_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping such as {5: 2, 10: 4}",
}

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


def setting_types(key: str) -> frozenset[type]:
    """The plain types that the value of the setting `key` may have, such as {int, NoneType}; a section has none.

    Raises:
        LowcalError: there is no such setting.
    """
    model: type[Settings] | None = Recipe
    for part in key.split("."):
        if model is None or part not in model.model_fields:
            raise LowcalError(f"unknown setting '{key}'{nearest_key(key)}")
        annotation, model = model.model_fields[part].annotation, section_of(model, part)
    if model is not None and model.short:
        return setting_types(f"{key}.{model.short}")
    leaves = () if model is not None else _leaves(annotation)
    return frozenset(leaf if isinstance(leaf, type) else type(leaf) for leaf in leaves)


def section_of(model: type[Settings], field: str) -> type[Settings] | None:
    """The settings that `field` of `model` holds; None if it holds a plain value."""
    annotation = model.model_fields[field].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def as_written(parts: list[str]) -> list[str]:
    """The way to a setting, or to its section where a plain value may stand for it."""
    section = section_of(Recipe, parts[0]) if len(parts) == 2 and parts[0] in Recipe.model_fields else None
    return parts[:1] if section is not None and section.short == parts[1] else parts


def allowed_values(parts: list[str]) -> str | None:
    """What a setting may be, in words, from the types and bounds of its field; None where they do not say."""
    model: type[Settings] | None = Recipe
    for part in parts[:-1]:
        model = section_of(model, part) if model is not None and part in model.model_fields else None
    if model is None or parts[-1] not in model.model_fields:
        return None
    section = section_of(model, parts[-1])
    if section is not None and section.short:
        return allowed_values([*parts, section.short])
    field = model.model_fields[parts[-1]]
    kinds: list[str] = []
    bounds: list[str] = []
    for item in (*_leaves(field.annotation), *field.metadata):
        match item:
            case Ge(ge=limit):
                bounds.append(f"at least {limit}")
            case Gt(gt=limit):
                bounds.append(f"above {limit}")
            case Le(le=limit):
                bounds.append(f"at most {limit}")
            case Lt(lt=limit):
                bounds.append(f"below {limit}")
            case str():
                kinds.append(f"'{item}'")
            case type() if item in _WORDS:
                kinds.append(_WORDS[item])
    if not kinds:
        return None
    words = ", ".join(kinds[:-1]) + " or " + kinds[-1] if len(kinds) > 1 else kinds[0]
    return "must be " + ", ".join(filter(None, [words, " and ".join(bounds)]))


def unknown_keys(data: Mapping[str, Any], model: type[Settings], prefix: str) -> Iterator[str]:
    """The dotted keys of `data` that are no settings of `model`; `prefix` goes before each."""
    for key, value in data.items():
        if key not in model.model_fields:
            yield f"{prefix}{key}"
        elif (inner := section_of(model, key)) is not None and isinstance(value, dict):
            yield from unknown_keys(value, inner, f"{prefix}{key}.")


def nearest_key(key: str) -> str:
    """The remedy for an unknown key: the nearest full key, also where only its last part was given."""
    known = list(known_keys(Recipe))
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not match:
        leaf = key.rpartition(".")[2]
        leaves = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.6)
        match = [k for k in known if leaves and k.rpartition(".")[2] == leaves[0]]
    if match:
        return "; did you mean " + " or ".join(f"'{m}'" for m in match) + "?"
    return nearest(key, Recipe.model_fields)


def setting_meant_by(name: str) -> str | None:
    """The key that other programs' option `name` would set (`lr` for optimizer.lr); None where there is none."""
    if name in _OPTIONS:
        return _OPTIONS[name]
    keys = list(known_keys(Recipe))
    found = [key for key in keys if key == name] or [key for key in keys if key.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def known_keys(model: type[Settings], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings of `model`; `prefix` goes before each."""
    for field in model.model_fields:
        inner = section_of(model, field)
        if inner is None:
            yield f"{prefix}{field}"
        else:
            yield from known_keys(inner, f"{prefix}{field}.")


def _leaves(annotation: Any) -> Iterator[Any]:
    """The plain types, literal values and bounds inside an annotation."""
    origin = get_origin(annotation)
    if origin is dict:
        yield dict
    elif origin in {Union, UnionType}:
        for part in get_args(annotation):
            yield from _leaves(part)
    elif hasattr(annotation, "__metadata__"):
        yield from _leaves(get_args(annotation)[0])
        for item in annotation.__metadata__:
            yield from item.metadata
    elif origin is not None:
        yield from get_args(annotation)
    else:
        yield annotation
