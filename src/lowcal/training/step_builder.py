"""The steps of a run: building them after each move, and choosing the fastest mode."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lowcal.activations import FILE
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.norms import separate
from lowcal.step_times import time_in_turn
from lowcal.steps.graphed import EAGER_STEPS
from lowcal.steps.modes import build_step, candidates
from lowcal.steps.step import EagerStep, Step, StepOptions, is_out_of_memory, keep_batch, now
from lowcal.training.cached import CachedBatches, CachedStep
from lowcal.training.distributed import TrainingGroup
from lowcal.training.step_choice import keep, recall
from lowcal.training.weight_mean import AveragedStep

if TYPE_CHECKING:
    from lowcal.training.train_state import RunState, TrainState

MARGIN = 0.97  # a smaller gain is noise
TRIAL_STEPS = EAGER_STEPS + 2  # the step after these is replayed
TRIALS = 4  # of modes that need no compiling, at most: two, and two with local updates
TRIAL_SECONDS = 4.0 / TRIALS
LONG_RUN = 3600.0  # seconds of eager steps, from which on minutes of compiling are earned back


def fastest(modes: Sequence[str], seconds: Callable[[str], float]) -> dict[str, float]:
    """The time of a step in each mode that applies, the fastest mode last.

    A mode counts as faster only if it is clearly faster than those before it.

    Args:
        modes: the candidates. The first one must apply.
        seconds: time of a step in a mode. A mode that does not apply (LowcalError) or runs out of memory is left out.
    """
    times = {modes[0]: seconds(modes[0])}
    best = modes[0]
    for mode in modes[1:]:
        try:
            times[mode] = seconds(mode)
        except Exception as error:
            if not isinstance(error, LowcalError) and not is_out_of_memory(error):
                raise
            continue
        if times[mode] < MARGIN * times[best]:
            best = mode
    least = times.pop(best)
    return {**times, best: least}


_times: dict[Hashable, dict[str, float]] = {}  # what `fastest` said in this process, or kept in a run's folder


class DistributedStep(EagerStep):
    """The step of one of several processes on its shard: up to rounding that of one process on the whole mini-batch.

    Shards may differ in size, and be empty. Normalisation layers use the statistics of the shard, unless they are
    synchronised. What the network draws at random (dropout) differs from process to process.
    """

    def __init__(self, optimizer: Optimizer, method: Method, options: StepOptions, *, group: TrainingGroup) -> None:
        device_ids = [group.device.index] if group.device.type == "cuda" else None
        super().__init__(method.parallel(device_ids=device_ids), (optimizer,), method, options)
        self._group = group

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on this process's shard; returns the mean loss over all shards."""
        with self._group.own_random():
            return super().__call__(*batch)

    def _losses(self, *part: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = part
        own = self._options.loss_fn(self._model(images), labels, reduction="sum")
        count = torch.full((), len(labels), dtype=own.dtype, device=own.device)
        total, count = self._group.sum(torch.stack((own.detach(), count))).unbind()
        # DDP divides the sum of the gradients by the number of processes.
        return total / count, own * (self._group.world / count)


class StepBuilder:
    """Builds the steps of a run, and tries them on copies.

    Attributes:
        step: the training step for the network as it was at the last `rebuild`.
    """

    step: Step

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._cache: CachedBatches | None = None
        method, cache = state.train.method, state.options.cache
        if cache is not None and method.caches:
            (state.folder.path / FILE).unlink(missing_ok=True)  # a resumed run makes its cache again
            self._cache = CachedBatches.of_run(method, state.loader, cache, state.folder.path)
        self.step = self._build(state.train, state.group, state.step_mode or "eager", self._cache)

    def rebuild(self) -> None:
        """Builds the step for the network as it is now; to be called after each move."""
        if self._state.group.world > 1:
            del self.step
            gc.collect()  # also removes DDP's hooks on the parameters
        state = self._state
        self.step = self._build(state.train, state.group, state.step_mode or "eager", self._cache)

    def try_steps(
        self,
        steps: int,
        images: int | None = None,
        *,
        alone: bool = False,
        mode: str | None = None,
        seconds: float = 0.0,
        boundary: int | None = None,
    ) -> float:
        """Trains copies of everything on the next mini-batch's first `images` images.

        Args:
            steps: how many steps to take before time is measured.
            images: None for all of this process's images.
            alone: whether to leave out the other processes.
            mode: how the step runs; None: as in the run.
            seconds: measured is the mean of as many steps as this time allows, in all trials an epoch's at most; 0: of
                the last step.
            boundary: at which the copies are trained; None: as in the run.

        Returns:
            Seconds per step.
        """
        device = self._state.options.device
        with self._trial(images, alone=alone, mode=mode, boundary=boundary) as step:
            for _ in range(steps):
                start = now(device)
                step()
            taken = now(device) - start
            if count := min(int(seconds / taken), len(self._state.loader) // TRIALS):
                start = now(device)
                for _ in range(count):
                    step()
                taken = (now(device) - start) / count
            return taken

    def step_times(self, boundaries: Sequence[int], images: int) -> dict[int, float]:
        """Seconds of a step at each boundary, on copies that take their steps in turn; on a GPU one after another."""
        device, period = self._state.options.device, self._state.train.method.period

        def work(step: Callable[[], Tensor]) -> float:
            start = now(device)
            for _ in range(period):
                step()
            return (now(device) - start) / period

        times: dict[int, float] = {}
        for group in [boundaries] if device.type == "cpu" else [[boundary] for boundary in boundaries]:
            with ExitStack() as stack:
                trials = {each: stack.enter_context(self._trial(images, boundary=each)) for each in group}
                times |= time_in_turn({each: partial(work, step) for each, step in trials.items()})
        return times

    @contextmanager
    def _trial(
        self, images: int | None, *, alone: bool = False, mode: str | None = None, boundary: int | None = None
    ) -> Iterator[Callable[[], Tensor]]:
        """A step of copies of everything, on the next mini-batch's first `images` images; arguments as `try_steps`."""
        state, device = self._state, self._state.options.device
        position = state.loader.state_dict()
        batch = [tensor[:images] for tensor in next(state.loader.raw_batches())]
        state.loader.load_state_dict(position)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            trial = state.train.copy(state.loader.sample_input(1))
            if boundary is not None:
                trial.method.move_to(boundary)
            trial.model.train()
            if alone:
                separate(trial.model)
            try:
                cache = None
                if self._cache is not None and trial.method.boundary:
                    cache, batch = CachedBatches.of_batch(trial.method, *state.loader.collate(*batch))
                yield partial(self._build(trial, TrainingGroup(), mode or state.step_mode or "eager", cache), *batch)
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

    def choose_mode(self, images: int) -> str | None:
        """Decides "auto" for the whole run by the times of steps with `images` images.

        Runs of one network with the same settings share the decision, also in later processes (`step_choice`).
        Compiling is tried only in runs that take longer than `LONG_RUN`. A second stream is tried only for recorded
        steps with local updates, at a boundary in the middle of the run.

        Returns:
            What was chosen and why, if modes were tried; `rebuild` must be called if the mode is not "eager".
        """
        state = self._state
        if state.step_mode is not None:
            return None
        options, method, device = state.options, state.train.method, state.options.device
        modes = [mode for mode in candidates(device) if mode == "eager" or method.unreplayable is None]
        if len(modes) == 1:
            state.step_mode = modes[0]
            return None
        compiled = [] if self._cache is not None else ["compiled", "graphed-compiled"]
        shapes = tuple((tuple(p.shape), p.stride()) for p in state.train.model.parameters())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        key = (
            *(shapes, state.loader.shape, images, name, torch.__version__, options.precision, options.max_skips > 0),
            *(self._cache is not None, *modes),
        )

        def seconds(mode: str, boundary: int | None = None) -> float:
            return self.try_steps(TRIAL_STEPS, images, mode=mode, seconds=TRIAL_SECONDS, boundary=boundary)

        times, note = self._decide(key, modes, seconds)
        notes = [note]
        if times["eager"] * len(state.loader) * options.epochs > LONG_RUN:
            known, every = times, (*times, *compiled)
            times, note = self._decide((key, every), every, lambda mode: known.get(mode) or seconds(mode))
            notes.append(note)
        if list(times)[-1] == "graphed" and (place := method.middle):
            pair = ("graphed", "graphed-overlapped")
            times, note = self._decide((key, place), pair, partial(seconds, boundary=place), f" at boundary {place}")
            notes.append(note)
        state.step_mode = list(times)[-1]
        return "; ".join(filter(None, notes)) or None

    def _decide(
        self, key: Hashable, modes: Sequence[str], seconds: Callable[[str], float], where: str = ""
    ) -> tuple[dict[str, float], str | None]:
        """What `fastest` says, or said before for the same `key`; and what was chosen and why, if that is news."""
        if key in _times:
            return _times[key], None
        folder, begin = self._state.folder.path, perf_counter()
        if (times := recall(folder, key, modes)) is not None:
            how = f"as measured before for {folder.parent}"
        else:
            times = fastest(modes, seconds)
            keep(folder, key, times)
            how = f"chosen in {perf_counter() - begin:.1f} s by the time of a step"
        _times[key] = times
        *others, mode = times
        steps = ", ".join(f"{name} {1000 * times[name]:.3g} ms" for name in (mode, *others))
        return times, f"step={mode}, {how}{where}: {steps}"

    def _build(self, train: TrainState, group: TrainingGroup, mode: str, cache: CachedBatches | None) -> Step:
        step = self._build_step(train, group, mode, cache)
        return AveragedStep(step, train.mean) if train.mean else step

    def _build_step(self, train: TrainState, group: TrainingGroup, mode: str, cache: CachedBatches | None) -> Step:
        loader, run = self._state.loader, self._state.options
        options = StepOptions(
            run.device,
            run.precision,
            train.scaler,
            guard=run.max_skips > 0,
            batch=loader.batch,
            collate=loader.collate,
            loss_fn=partial(F.cross_entropy, label_smoothing=run.label_smoothing),
            max_norm=run.max_norm,
        )
        if group.world > 1:
            return DistributedStep(train.optimizer, train.method, options, group=group)
        if cache is not None and train.method.boundary:
            options = replace(options, collate=keep_batch)
            step = build_step(mode, cache.network.suffix, (train.optimizer,), train.method, options)
            return CachedStep(step, cache, options)
        return build_step(mode, train.model, (train.optimizer,), train.method, options)
