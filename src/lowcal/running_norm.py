"""Normalisation by running statistics in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lowcal.hooks import TraceableHook


class RunningNorms:
    """Normalisation layers that in training too use their running statistics, and leave them as they are.

    A normalisation layer does so in evaluation mode, which ``model.train()`` ends. So a hook puts them back into that
    mode before each forward pass of the network.

    Args:
        model: the network.

    Attributes:
        handles: of the hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[RemovableHandle] = []
        self._model = model
        self._norms: Sequence[nn.Module] = ()
        self._stilled: set[nn.Module] = set()  # those found in training mode; the others are as the user set them

    def take(self, norms: Sequence[nn.Module]) -> None:
        """Lets `norms`, those taken before among them, use their running statistics from the next pass on."""
        if not self.handles:
            self.handles.append(self._model.register_forward_pre_hook(TraceableHook(self._still)))
        self._norms = norms

    def restore(self) -> None:
        """Gives the layers the network's own mode back; the hook is to be removed first."""
        for norm in self._stilled:
            norm.training = self._model.training
        self._stilled.clear()

    def _still(self, module: nn.Module, inputs: Any) -> None:
        for norm in self._norms:
            if norm.training:
                norm.training = False
                self._stilled.add(norm)
