"""The ways to run a training step, by name; building the steps of a run, and choosing the fastest way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError, nearest
from lowcal.methods import Method
from lowcal.norms import separate
from lowcal.training.batch_growth import is_out_of_memory
from lowcal.training.compiled import CompiledStep
from lowcal.training.distributed import TrainingGroup
from lowcal.training.graphed import GraphedStep
from lowcal.training.step import DistributedStep, EagerStep, Step, StepOptions, now

if TYPE_CHECKING:
    from lowcal.training.train_state import RunState, TrainState

MARGIN = 0.97  # a smaller gain is noise

STEPS: dict[str, type[EagerStep | CompiledStep | GraphedStep]] = {
    "eager": EagerStep,
    "compiled": CompiledStep,
    "graphed": GraphedStep,
}


def find_step(mode: str) -> type[EagerStep | CompiledStep | GraphedStep]:
    """The class of the steps of the given mode; its `check` raises LowcalError where the mode does not apply.

    Raises:
        LowcalError: there is no such mode.
    """
    if mode not in STEPS:
        raise LowcalError(f"there is no step {mode!r}{nearest(mode, STEPS)}")
    return STEPS[mode]


def candidates(device: torch.device) -> Sequence[str]:
    """The modes that "auto" chooses from on `device`, the simplest first.

    On a CPU that is only the eager mode: there a step waits for arithmetic, which is the same in all modes, and
    compiling takes longer than many an epoch.
    """
    return tuple(STEPS) if device.type == "cuda" else ("eager",)


def fastest(modes: Sequence[str], seconds: Callable[[str], float]) -> str:
    """The mode with the shortest step; a mode must be clearly faster than those before it.

    Args:
        modes: the candidates. The first one must apply.
        seconds: time of a step in a mode. A mode that does not apply (LowcalError) or runs out of memory is skipped.
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
    """The training step of the given mode for the network as it is now; build another one after each move.

    Raises:
        LowcalError: there is no such mode, or it does not apply.
    """
    return find_step(mode)(model, optimizer, method, options)


class StepBuilder:
    """Builds the steps of a run, and tries them on copies.

    Attributes:
        step: the training step for the network as it was at the last `rebuild`.
    """

    step: Step

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.step = self._build(state.train, state.group, state.step_mode or "eager")

    def rebuild(self) -> None:
        """Builds the step for the network as it is now; to be called after each move."""
        if self._state.group.world > 1:
            del self.step
            gc.collect()  # also removes DDP's hooks on the parameters
        self.step = self._build(self._state.train, self._state.group, self._state.step_mode or "eager")

    def try_steps(
        self, steps: int, images: int | None = None, *, alone: bool = False, mode: str | None = None
    ) -> float:
        """Trains copies of everything on the next mini-batch's first `images` images.

        Args:
            steps: how many steps to take.
            images: None for all of this process's images.
            alone: whether to leave out the other processes.
            mode: how the step runs; None: as in the run.

        Returns:
            Seconds per step: the mean of the second half of `steps`.
        """
        state, device = self._state, self._state.options.device
        position = state.loader.state_dict()
        batch = [tensor[:images] for tensor in next(state.loader.raw_batches())]
        state.loader.load_state_dict(position)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            trial = state.train.copy(state.loader.sample_input(1))
            trial.model.train()
            if alone:
                separate(trial.model)
            try:
                step = self._build(trial, TrainingGroup(), mode or state.step_mode or "eager")
                for index in range(steps):
                    if index == steps // 2:
                        start = now(device)
                    step(*batch)
                return (now(device) - start) / (steps - steps // 2)
            finally:
                trial.method.detach()

    def has_memory(self) -> bool:
        """Whether this process alone can take a step with its shard of the mini-batch."""
        try:
            self.try_steps(1, alone=True)
        except Exception as error:
            if is_out_of_memory(error):
                return False
            raise
        return True

    def choose_mode(self, steps: int, images: int) -> bool:
        """Decides "auto" for the whole run, by `steps` steps with `images` images in each mode.

        Returns:
            Whether several modes were tried, so that `rebuild` must be called.
        """
        if self._state.step_mode is not None:
            return False
        modes = candidates(self._state.options.device)
        self._state.step_mode = fastest(modes, lambda mode: self.try_steps(steps, images, mode=mode))
        return len(modes) > 1

    def _build(self, train: TrainState, group: TrainingGroup, mode: str) -> Step:
        loader, run = self._state.loader, self._state.options
        options = StepOptions(
            run.device,
            run.precision,
            train.scaler,
            guard=run.max_skips > 0,
            batch=loader.batch,
            collate=loader.collate,
        )
        if group.world > 1:
            return DistributedStep(train.optimizer, train.method, options, group=group)
        return build_step(mode, train.model, train.optimizer, train.method, options)
