"""Hooks that die in copies of what they are on, so that a hooked network can be copied and pickled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Mortal:
    """Becomes a hook that does nothing in a copy of its module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


class Hook(_Mortal):
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


class Tap(_Mortal):
    """The forward hook of a local layer, through which its update is made; register it with keyword arguments.

    In a plain pass it calls `hook`. A pass that is compiled can call nothing that works on Python's objects, so there
    the update is computed as a part of the graph, and kept here until the pass has ended.

    Args:
        make: the update from the layer, its input and its output.
        hook: called with the hook's own arguments.

    Attributes:
        due: whether a compiled pass is to make an update.
        update: what the last compiled pass made.
    """

    def __init__(self, make: Callable[[nn.Module, Tensor, Tensor], Tensor], hook: Callable[..., None]) -> None:
        self.due = True
        self.update: Tensor | None = None
        self._make, self._hook = make, hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Tensor) -> None:
        """Makes the layer's update, if it is time."""
        if not torch.compiler.is_compiling():
            self._hook(module, args, kwargs, outputs)
        elif self.due and module.training and torch.is_grad_enabled():
            inputs = args[0] if args else kwargs["input"]
            with torch.no_grad():
                self.update = self._make(module, inputs.detach(), outputs.detach())


def _inert(*_: Any) -> None:
    """What a hook becomes in a copy of its module."""


def _make_inert() -> Callable[..., None]:
    return _inert
