"""Hooks that become no-ops when their module is copied, so that a network with hooks can be copied and pickled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.products import ProductCapture, at_least_single


class _OfOneModule:
    """Becomes a no-op when its module is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


class Hook(_OfOneModule):
    """A hook that does not keep its owner alive, and does not copy it with the module.

    Compiled passes skip it, since they cannot run Python code.

    Args:
        function: called with `bound` and then the hook's own arguments; a bound method is held weakly.
        bound: the first arguments.
    """

    def __init__(self, function: Callable[..., Any], *bound: Any) -> None:
        self._bound = bound
        self._method = weakref.WeakMethod(function) if hasattr(function, "__self__") else lambda: function

    def __call__(self, *args: Any) -> Any:
        """Calls the function; returns None once its owner is deleted."""
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
        """Calls the function."""
        return self._function(*args)


class UpdateHook(_OfOneModule):
    """Makes the update of a local layer during the forward pass, from the input and output of its product.

    A plain pass passes them to `learn`. A compiled pass cannot, so its update is computed in the graph and stays in
    `update` until it is collected. Updates of several passes add up.

    Args:
        layer: the layer.
        make: returns the update for the layer, its input and its output; a compiler can trace it.
        learn: called with the layer, its input and its output, without gradients.

    Attributes:
        due: whether a pass makes an update.
        update: the update that compiled passes made.
    """

    def __init__(
        self,
        layer: nn.Module,
        make: Callable[[nn.Module, Tensor, Tensor], Tensor],
        learn: Callable[[nn.Module, Tensor, Tensor], None],
    ) -> None:
        self.due = True
        self.update: Tensor | None = None
        self._layer, self._make, self._learn = layer, make, learn

    def __call__(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        """Makes the update of `module`, which is the layer or a plain one like it, if it is due."""
        if not (self.due and self._layer.training and torch.is_grad_enabled()):
            return
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() == -1:  # else activation checkpointing runs this pass a second time
                a = inputs.detach() if inputs.requires_grad else inputs
                z = outputs.detach() if outputs.requires_grad else outputs
                with torch.no_grad():
                    self._learn(module, a, z)
            return
        with torch.no_grad():
            update = self._make(module, inputs.detach(), outputs.detach())
        if self.update is None:
            self.update = update
        else:
            self.update = at_least_single(self.update) + update


class LayerHook(_OfOneModule):
    """The forward hook of a layer that does not override ``forward``; register it ``with_kwargs``."""

    def __init__(self, hook: UpdateHook) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Tensor) -> None:
        """Passes the layer's input and output on."""
        self._hook(module, args[0] if args else kwargs["input"], outputs)


class CaptureHook(_OfOneModule):
    """A hook on a layer that overrides ``forward``: enters `capture` before it, or exits it after it."""

    def __init__(self, capture: ProductCapture, *, enters: bool) -> None:
        self._capture, self._enters = capture, enters

    def __call__(self, *_: Any) -> None:
        """Enters or exits the capture."""
        if self._enters:
            self._capture.__enter__()
        else:
            self._capture.__exit__(None, None, None)


def _inert(*_: Any) -> None:
    """The no-op that a hook becomes in a copy of its module."""


def _make_inert() -> Callable[..., None]:
    return _inert
