"""Hooks that do nothing in copies of their module, so that a hooked network can be copied and pickled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.products import ProductCapture


class _OfOneModule:
    """Becomes a hook that does nothing in a copy of its module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


class Hook(_OfOneModule):
    """A hook that keeps neither its owner alive nor anything of it in copies of the module it is on.

    Compiled passes skip it: they can call nothing that works on Python's objects.

    Args:
        function: called with `bound` and then the hook's own arguments; a bound method is held weakly.
        bound: the first arguments.
    """

    def __init__(self, function: Callable[..., Any], *bound: Any) -> None:
        self._bound = bound
        self._method = weakref.WeakMethod(function) if hasattr(function, "__self__") else lambda: function

    def __call__(self, *args: Any) -> Any:
        """What the function gives; None once its owner is gone."""
        if torch.compiler.is_compiling():
            return None
        function = self._method()
        return None if function is None else function(*self._bound, *args)


class TraceableHook(_OfOneModule):
    """A hook that compiled passes run too; it keeps its owner alive until it is removed.

    Args:
        function: called with the hook's own arguments; a compiler can trace it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self._function(*args)


class UpdateHook(_OfOneModule):
    """What makes the update of a local layer in the pass that runs it, from the input and output of its product.

    In a plain pass it hands the update to `keep`. A compiled pass cannot, so there the update is computed as a part of
    the graph, and lies here until someone collects it; those of several passes add up.

    Args:
        layer: the layer.
        make: the update from the layer, its input and its output.
        keep: called with the update.

    Attributes:
        due: whether a pass is to make an update.
        update: what compiled passes made.
    """

    def __init__(
        self,
        layer: nn.Module,
        make: Callable[[nn.Module, Tensor, Tensor], Tensor],
        keep: Callable[[Tensor], None],
    ) -> None:
        self.due = True
        self.update: Tensor | None = None
        self._layer, self._make, self._keep = layer, make, keep

    def __call__(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        """Makes the update of `module`, the layer or a plain one like it, if it is time."""
        if not (self.due and self._layer.training and torch.is_grad_enabled()):
            return
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs this pass a second time
        with torch.no_grad():
            update = self._make(module, inputs.detach(), outputs.detach())
        if not is_compiling:
            self._keep(update)
        elif self.update is None:
            self.update = update
        else:
            self.update = self.update + update


class LayerHook(_OfOneModule):
    """The forward hook of a layer with torch's own forward; register it with keyword arguments."""

    def __init__(self, hook: UpdateHook) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Tensor) -> None:
        """Hands the layer's input and output on."""
        self._hook(module, args[0] if args else kwargs["input"], outputs)


class CaptureHook(_OfOneModule):
    """A hook on a layer with a forward of its own: before it, enters `capture`; after it, leaves it."""

    def __init__(self, capture: ProductCapture, *, enters: bool) -> None:
        self._capture, self._enters = capture, enters

    def __call__(self, *_: Any) -> None:
        """Enters or leaves."""
        if self._enters:
            self._capture.__enter__()
        else:
            self._capture.__exit__(None, None, None)


def _inert(*_: Any) -> None:
    """What a hook becomes in a copy of its module."""


def _make_inert() -> Callable[..., None]:
    return _inert
