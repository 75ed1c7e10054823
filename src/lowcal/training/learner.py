"""What training changes in a run, saved and loaded as one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lowcal.methods import Method
from lowcal.training.random_state import RandomState
from lowcal.training.step import build_scaler


@dataclass(frozen=True)
class Learner:
    """A network with all that its next training step depends on, but for the images.

    Attributes:
        model: the network.
        optimizer: of its parameters.
        method: attached to both.
        scaler: of gradients, in half precision.
        random: torch's global generators as this network's training sees them.
    """

    model: nn.Module
    optimizer: Optimizer
    method: Method
    scaler: GradScaler | None
    random: RandomState

    def twin(self, example: Tensor, *, seed: int, device: torch.device, precision: str) -> Learner:
        """A copy to try things on, whose method stands where this one's does; `example` is one image, (1, C, H, W)."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        method = self.method.twin(model, optimizer, example)
        return Learner(model, optimizer, method, build_scaler(device, precision), RandomState(seed, device))

    def state_dict(self) -> dict[str, Any]:
        """All of it: tensors and plain values."""
        return {
            "method": self.method.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "random": self.random.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; a state that does not fit may be loaded in part, so try it on a twin."""
        self.method.load_state_dict(state["method"])  # first: it may give the network another shape
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.random.load_state_dict(state["random"])
