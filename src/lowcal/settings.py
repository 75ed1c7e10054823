"""Settings: frozen dataclasses whose annotations say which values their fields take. Needs no torch."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lowcal.errors import LowcalError, is_number

_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a mapping such as {5: 2, 10: 4}",
}


@dataclass(frozen=True)
class Limits:
    """The bounds of a number, or of the length of a text in `unit`, for `Annotated`; None is no bound."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    unit: str = ""

    def hold(self, value: Any) -> bool:
        """Whether `value`, or the length of a text, is within the bounds."""
        size = len(value) if isinstance(value, str) else value
        given = [(holds, getattr(self, name)) for name, (_, holds) in _BOUNDS.items()]
        return all(bound is None or holds(size, bound) for holds, bound in given)

    def __str__(self) -> str:
        given = [(word, getattr(self, name)) for name, (word, _) in _BOUNDS.items()]
        return " and ".join(f"{word} {bound}" for word, bound in given if bound is not None) + self.unit


@dataclass(frozen=True)
class Written:
    """The form of a text, a regular expression, with an `example`, for `Annotated`."""

    form: str
    example: str

    def hold(self, value: Any) -> bool:
        """Whether `value` has the form."""
        return isinstance(value, str) and re.fullmatch(self.form, value) is not None

    def __str__(self) -> str:
        return f"as in {self.example}"


Count = Annotated[int, Limits(least=1)]
Whole = Annotated[int, Limits(least=0)]
Positive = Annotated[float, Limits(above=0)]
NonNegative = Annotated[float, Limits(least=0)]
Fraction = Annotated[float, Limits(above=0, most=1)]


class SettingError(LowcalError):
    """A value that a setting does not take: `name`, `value`, and in words what is `allowed`."""

    def __init__(self, owner: str, name: str, value: Any, allowed: str) -> None:
        super().__init__(f"{owner}: {name} is {value!r}; give {allowed}")
        self.name, self.value, self.allowed = name, value, allowed


@dataclass(frozen=True)
class Settings:
    """Base class: construction raises LowcalError for a value that its field's annotation does not allow.

    It checks bool, int, float, str, None, literals, mappings, unions of them, `Limits` and `Written`; fields with other
    annotations it leaves alone. A bool is no number, and numbers are finite. An int becomes a float where one is due.
    """

    def __post_init__(self) -> None:
        for name, annotation in annotations_of(type(self)).items():  # type: ignore[arg-type]  # mypy: not hashable
            value = getattr(self, name)
            if not accepts(annotation, value):
                raise SettingError(type(self).__name__, name, value, allowed(annotation))
            if isinstance(value, int) and plain_types(annotation) & {bool, int, float} == {float}:
                object.__setattr__(self, name, float(value))


@functools.cache  # Python evaluates the annotations in each call
def annotations_of(settings: type) -> Mapping[str, Any]:
    """The annotation of each field of a dataclass, in order."""
    found = get_type_hints(settings, include_extras=True)
    return {field.name: found[field.name] for field in fields(settings)}


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a field with `annotation` takes `value`."""
    return any(
        _is_of(kind, value) and all(limit.hold(value) for limit in limits) for kind, limits in _kinds(annotation)
    )


def allowed(annotation: Any) -> str:
    """What a field with `annotation` takes, in words."""
    kinds = [(kind, limits) for kind, limits in _kinds(annotation) if kind is not NoneType]
    *words, last = [_WORDS.get(get_origin(kind) or kind, repr(kind)) for kind, _ in kinds]
    either = f"{', '.join(words)} or {last}" if words else last
    return ", ".join([either, *(str(limit) for _, limits in kinds for limit in limits)])


def plain_types(annotation: Any) -> frozenset[type]:
    """The types of the values that a field with `annotation` takes, such as {int, NoneType}."""
    kinds = [get_origin(kind) or kind for kind, _ in _kinds(annotation)]
    return frozenset(kind if isinstance(kind, type) else type(kind) for kind in kinds)


def _kinds(annotation: Any) -> list[tuple[Any, tuple[Limits | Written, ...]]]:
    """The types and the literal texts inside an annotation, each with its limits."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return [(kind, (*limits, *args[1:])) for kind, limits in _kinds(args[0])]
    if origin in (Union, UnionType):
        return [kind for arg in args for kind in _kinds(arg)]
    return [(arg, ()) for arg in args] if origin is Literal else [(annotation, ())]


def _is_of(kind: Any, value: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is Mapping:
        of_key, of_item = get_args(kind)
        return isinstance(value, Mapping) and all(
            accepts(of_key, key) and accepts(of_item, item) for key, item in value.items()
        )
    if isinstance(kind, str):
        return isinstance(value, str) and value == kind
    return kind not in (bool, str, NoneType) or isinstance(value, kind)
