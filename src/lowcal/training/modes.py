"""The ways to run a training step, by name."""

from __future__ import annotations

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods import Method
from lowcal.training.compiled import CompiledStep
from lowcal.training.graphed import GraphedStep
from lowcal.training.step import EagerStep, Step

STEPS: dict[str, type[EagerStep | CompiledStep | GraphedStep]] = {
    "eager": EagerStep,
    "compiled": CompiledStep,
    "graphed": GraphedStep,
}


def find_step(mode: str) -> type[EagerStep | CompiledStep | GraphedStep]:
    """The class of the steps of the given mode; its `check` tells whether it applies.

    Raises:
        LowcalError: there is no such mode.
    """
    if mode not in STEPS:
        raise LowcalError(f"there is no step {mode!r}{nearest(mode, STEPS)}")
    return STEPS[mode]


def build_step(
    mode: str,
    model: nn.Module,
    optimizer: Optimizer,
    method: Method,
    *,
    device: torch.device,
    precision: str,
    scaler: GradScaler | None,
    guard: bool = False,
    batch: int | None = None,
) -> Step:
    """The training step of the given mode for the network as it is now; build another after each move.

    Args:
        batch: images in a whole mini-batch, if some may be smaller.

    Raises:
        LowcalError: there is no such mode, or it does not apply.
    """
    return find_step(mode)(
        model, optimizer, method, device=device, precision=precision, scaler=scaler, guard=guard, batch=batch
    )
