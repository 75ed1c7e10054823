"""The kinds of step, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.steps.compiled import CompiledStep
from lowcal.steps.graphed import CompiledGraphedStep, GraphedStep, OverlappedGraphedStep
from lowcal.steps.step import EagerStep, Learning, Step, StepOptions

STEPS: dict[str, type[EagerStep | CompiledStep | GraphedStep]] = {
    "eager": EagerStep,
    "compiled": CompiledStep,
    "graphed": GraphedStep,
    "graphed-compiled": CompiledGraphedStep,
    "graphed-overlapped": OverlappedGraphedStep,
}


def find_step(mode: str) -> type[EagerStep | CompiledStep | GraphedStep]:
    """The class of the steps of the given mode; its `check` raises LowcalError where the mode does not apply.

    Raises:
        LowcalError: there is no such mode.
    """
    if mode not in STEPS:
        raise LowcalError(f"there is no step {mode!r}{nearest(mode, STEPS)}")
    return STEPS[mode]


def build_step(
    mode: str, model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions
) -> Step:
    """The training step of the given mode for the network as it is now; build another one after each move.

    Raises:
        LowcalError: there is no such mode, or it does not apply.
    """
    return find_step(mode)(model, optimizers, learning, options)


def candidates(device: torch.device) -> tuple[str, ...]:
    """The modes that "auto" chooses from on `device` without compiling anything, the simplest first.

    On a CPU that is only the eager mode: there a step waits for arithmetic, which is the same in all modes.
    """
    return ("eager", "graphed") if device.type == "cuda" else ("eager",)
