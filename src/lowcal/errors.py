"""The one exception raised for what a user did, and the hint at the name they may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["LowcalError", "nearest"]


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
