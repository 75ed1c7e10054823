"""The ways to run a training step, by name, and which of them is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods import Method
from lowcal.training.compiled import CompiledStep
from lowcal.training.graphed import GraphedStep
from lowcal.training.growth import is_out_of_memory
from lowcal.training.step import EagerStep, Step, StepOptions

MARGIN = 0.97  # less is noise

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


def candidates(device: torch.device) -> Sequence[str]:
    """The modes that "auto" chooses from on `device`, the simplest first.

    On a processor that is the eager one: there a step waits for arithmetic, which is the same in all modes, and
    compiling takes longer than many an epoch.
    """
    return tuple(STEPS) if device.type == "cuda" else ("eager",)


def fastest(modes: Sequence[str], seconds: Callable[[str], float]) -> str:
    """The mode whose step takes least time; one that is not clearly faster than those before it does not count.

    Args:
        seconds: of a step in that mode; a mode that does not apply (LowcalError), or for which memory runs out, is left
            out, but for the first.
    """
    best, least = modes[0], seconds(modes[0]) if len(modes) > 1 else 0.0
    for mode in modes[1:]:
        try:
            taken = seconds(mode)
        except Exception as error:
            if not isinstance(error, LowcalError) and not is_out_of_memory(error):
                raise
            continue
        if taken < MARGIN * least:
            best, least = mode, taken
    return best


def build_step(mode: str, model: nn.Module, optimizer: Optimizer, method: Method, options: StepOptions) -> Step:
    """The training step of the given mode for the network as it is now; build another after each move.

    Raises:
        LowcalError: there is no such mode, or it does not apply.
    """
    return find_step(mode)(model, optimizer, method, options)
