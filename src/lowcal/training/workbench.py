"""Where a run's training steps are built, and tried on copies of everything."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcal.data import Loader
from lowcal.synced_norm import separate
from lowcal.training.epoch import now
from lowcal.training.growth import is_out_of_memory
from lowcal.training.learner import Learner
from lowcal.training.modes import build_step, candidates, fastest, find_step
from lowcal.training.ranked_step import RankedStep
from lowcal.training.ranks import Ranks
from lowcal.training.step import Step, StepOptions


class Workbench:
    """Builds the steps of a run.

    Args:
        learner: what they train.
        train: the training images.
        ranks: the processes that train the network.
        device: where everything is.
        precision: "float32", "bf16" or "fp16".
        seed: of the copies' random generators.
        guard: whether a step is skipped if its loss or gradient is NaN or infinite.
        step: how a step is run: "eager", "compiled", "graphed", or "auto", which `choose` chooses from these.

    Attributes:
        mode: how a step is run; until `choose` has chosen, "eager".
    """

    def __init__(
        self,
        learner: Learner,
        train: Loader,
        *,
        ranks: Ranks,
        device: torch.device,
        precision: str,
        seed: int,
        guard: bool,
        step: str,
    ) -> None:
        self.mode = "eager" if step == "auto" else step
        self._modes = candidates(device) if step == "auto" and ranks.world == 1 else (step,)
        self._learner, self._train, self._ranks = learner, train, ranks
        self._device, self._precision, self._seed, self._guard = device, precision, seed, guard

    def build(self) -> Step:
        """The step for the network as it is now; build another after each move."""
        return self._build(self._learner, self._ranks, self.mode)

    def twin(self, example: Tensor) -> Learner:
        """A copy of what the steps train; `example` is one image, (1, C, H, W)."""
        return self._learner.twin(example, seed=self._seed, device=self._device, precision=self._precision)

    def rehearse(self, steps: int, most: int | None = None, *, alone: bool = False, mode: str | None = None) -> float:
        """Trains copies of everything on the coming mini-batch's first `most` images; `alone`: without other ranks.

        Returns:
            Seconds of a step: the mean of the second half of `steps`.
        """
        before = self._train.state_dict()
        given = [tensor[:most] for tensor in next(self._train.raw_batches())]
        self._train.load_state_dict(before)
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            twin = self.twin(self._train.sample_input(1))
            twin.model.train()
            if alone:
                separate(twin.model)
            try:
                step = self._build(twin, Ranks(), mode or self.mode)
                for index in range(steps):
                    if index == steps // 2:
                        start = now(self._device)
                    step(*given)
                return (now(self._device) - start) / (steps - steps // 2)
            finally:
                twin.method.detach()

    def has_memory(self) -> bool:
        """Whether this process by itself can take a step with its share of the batch."""
        try:
            self.rehearse(1, alone=True)
        except Exception as error:
            if is_out_of_memory(error):
                return False
            raise
        return True

    def choose(self, steps: int, most: int) -> bool:
        """Finds the fastest mode if it is open, by so many steps with `most` images each; whether it was open."""
        if len(self._modes) == 1:
            return False
        self.keep(fastest(self._modes, lambda mode: self.rehearse(steps, most, mode=mode)))
        return True

    def check(self, mode: str) -> None:
        """Raises LowcalError if there is no such mode, or it does not apply here."""
        learner = self._learner
        find_step(mode).check(learner.model, learner.optimizer, learner.method, self._device)

    def keep(self, mode: str) -> None:
        """Stays with that mode for good; it is not measured again."""
        self.mode, self._modes = mode, (mode,)

    def _build(self, learner: Learner, ranks: Ranks, mode: str) -> Step:
        options = StepOptions(
            self._device,
            self._precision,
            learner.scaler,
            guard=self._guard,
            batch=self._train.batch,
            make=self._train.collate,
        )
        if ranks.world > 1:
            return RankedStep(learner.optimizer, learner.method, options, ranks=ranks)
        return build_step(mode, learner.model, learner.optimizer, learner.method, options)
