"""Finds the order in which a network's layers run, from its own forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError
from lowcal.hooks import Hook
from lowcal.layers import Order, Tracer


class Discovery:
    """Watches the network's next forward pass, and layers that it left out, until every layer has its place.

    Args:
        model: the network.
        layers: its modules that can be layers, by name.
        found: called with the order, each time that more of it is known; held weakly.

    Attributes:
        order: what is known.
        settled: leading layers whose places cannot change any more; the controller sets it to the boundary.
        handles: of the hooks that watch.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], found: Callable[[Order], None]) -> None:
        self.order = Order()
        self.settled = 0
        self.handles: list[RemovableHandle] = []
        self._model = model
        self._layers = layers
        self._found = Hook(found)
        self._tracer: Tracer | None = None

    def watch_next_forward(self) -> None:
        """Takes the order from the network's next forward pass."""
        self._stop()
        self.handles += [
            self._model.register_forward_pre_hook(Hook(self._begin)),
            self._model.register_forward_hook(Hook(self._end), always_call=True),
        ]

    def take(self, order: Order) -> None:
        """Takes `order`, and watches for layers that it lacks.

        Raises:
            LowcalError: it has a new layer among the settled ones; nothing has changed then.
        """
        late = set(order.layers[: self.settled]) - set(self.order.layers)
        if late:
            raise LowcalError(_comes_late(late.pop()))
        self._found(order)
        self._stop()
        self.order = order
        for name, module in self._layers.items():
            if name not in order.layers:
                self.handles.append(module.register_forward_pre_hook(Hook(self._meet, name)))

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._tracer = Tracer(self._model)
        self._tracer.__enter__()

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        tracer.__exit__(None, None, None)
        # A pass that failed calls this too, with no output: the next one shows the order.
        if outputs is not None:
            self.take(self.order.merged(tracer.order()))

    def _meet(self, name: str, module: nn.Module, inputs: Any) -> None:
        """A layer runs that the order lacks: one that the first pass had left out."""
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.settled:
            raise LowcalError(_comes_late(name))
        self.watch_next_forward()

    def _stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _comes_late(name: str) -> str:
    return (
        f"layer '{name}' runs for the first time after the boundary has moved, so its place is not known; "
        "give LoCal example_inputs with which every layer runs"
    )
