"""LowcalError, the one exception for a user's mistake, and what its messages and checks share."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real

__all__ = ["LowcalError", "is_count", "is_number", "nearest"]


class LowcalError(ValueError):
    """A mistake by the user: one line that says what, the value found, and the remedy."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint for the end of a message: the choice nearest to `name`, or all choices.

    >>> nearest("resnet19", ["resnet18", "vgg13"])
    "; did you mean 'resnet18'?"
    >>> nearest("xyz", ["sgd", "local"])
    '; choose from local, sgd'
    """
    known = sorted(set(choices))
    lowered = {choice.lower(): choice for choice in known}
    close = get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {lowered[close[0]]!r}?"
    return f"; choose from {', '.join(known)}" if known else ""


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number; bool is not accepted."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object, least: int = 1) -> bool:
    """Whether `value` is a whole number of at least `least`; bool is not accepted."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
