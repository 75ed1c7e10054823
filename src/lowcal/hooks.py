"""Hooks that die in copies of what they are on, so that a hooked network can be copied and pickled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that keeps neither its owner alive nor anything of it in copies of the module it is on.

    Args:
        function: called with `bound` and then the hook's own arguments; a bound method is held weakly.
        bound: the first arguments.
    """

    def __init__(self, function: Callable[..., Any], *bound: Any) -> None:
        self._bound = bound
        self._method = weakref.WeakMethod(function) if hasattr(function, "__self__") else lambda: function

    def __call__(self, *args: Any) -> Any:
        """What the function gives; None once its owner is gone."""
        function = self._method()
        return None if function is None else function(*self._bound, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


def _inert(*_: Any) -> None:
    """What a hook becomes in a copy of its module."""


def _make_inert() -> Callable[..., None]:
    return _inert
