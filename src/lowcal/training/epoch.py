"""An epoch from its first step to its record: training, checkpoints, evaluation, and the move of the boundary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any, NoReturn

from torch import Tensor

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.steps.step import is_out_of_memory, now
from lowcal.training.batch_growth import release_memory
from lowcal.training.best import BestWeights
from lowcal.training.cost import CostMeter
from lowcal.training.epoch_state import DivergedError, EpochState
from lowcal.training.evaluation import evaluate
from lowcal.training.signals import Interrupted, deferred, ignore_signals, requested
from lowcal.training.step_builder import StepBuilder
from lowcal.training.train_state import RunState

CHECK_EVERY = 100  # steps; a look at the losses waits for the device
SHOW_EVERY = 0.25  # seconds; so does showing them


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a line on the screen.

    Attributes:
        epoch: counted from 0.
        epochs: in the whole run.
        step: finished steps of this epoch.
        steps: in this epoch.
        loss: mean training loss of this epoch so far.
        boundary: leading layers that do not learn by SGD.
        layers: weight layers of the network.
        images_per_second: in this epoch so far.
        seconds_left: of training in the whole run, at the pace of this epoch.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    boundary: int
    layers: int
    images_per_second: float
    seconds_left: float


class EpochLoop:
    """Trains a run epoch by epoch.

    Args:
        state: the run.
        steps: builds its training steps.
        test: the images for evaluation.

    Attributes:
        news: notes for the user on the last epoch.
    """

    def __init__(self, state: RunState, steps: StepBuilder, test: Loader) -> None:
        self.test = test
        self.news: tuple[str, ...] = ()
        self._state, self._steps = state, steps
        self._options, self._group, self._growth = state.options, state.group, state.growth
        self._model, self._method = state.train.model, state.train.method
        cached = self._options.cache is not None and self._method.caches
        mean = state.train.mean
        self._meter = CostMeter(
            self._method,
            self._options.device,
            self._options.precision,
            self._group.world,
            cached=cached,
            kept=mean.nbytes if mean else 0,
        )
        minutes = self._options.checkpoint_minutes if self._options.checkpoint else None
        self._save_every = math.inf if minutes is None else 60.0 * minutes
        self._last_save = 0.0
        self._best = BestWeights(state.folder)
        self._keeps_best = self._group.is_main and self._options.checkpoint
        self._signal = 0  # that the processes have agreed on

    @property
    def lr(self) -> float:
        """SGD's learning rate in the next epoch; in a warm-up that of its last step."""
        return self._lr_until(1.0)

    def rebuild(self) -> None:
        """Rebuilds what depends on the network's shape and on what learns in it."""
        self._steps.rebuild()
        self._meter.reset()

    def run(self, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates and saves; see `Run.run_epoch`."""
        self.news = ()
        with deferred():
            while not self._train(progress):
                self._restart_with_smaller_batch()  # not in _train, where the error still refers to the step's tensors
            record = self._evaluated()
            self._end_epoch(record)
            if signal := self._group.max(requested()):
                self._stop(signal)
        return record

    # Training

    def _train(self, progress: Callable[[Progress], None] | None) -> bool:
        """Takes the epoch's steps; returns False if memory ran out while the batch was on trial."""
        train = self._state.train
        epoch, is_new_trial = self._state.begin_epoch()
        # In a step a process cannot tell the others, which wait for its gradients, that its memory ran out.
        if is_new_trial and self._group.world > 1 and self._group.max(not self._steps.has_memory()):
            return False
        self._set_lr(1.0)
        self._model.train()
        try:
            with train.random.entered():
                self._meter.start()
                self._take_steps(epoch, progress)
        except DivergedError as error:
            raise self._diverged(str(error), error.step) from None
        except Exception as error:
            if self._growth.on_trial and self._group.world == 1 and is_out_of_memory(error):
                return False
            raise
        return True

    def _take_steps(self, epoch: EpochState, progress: Callable[[Progress], None] | None) -> None:
        """Takes one step with each mini-batch that is left of the epoch. The time that saving takes is not counted.

        Raises:
            DivergedError: too many losses or gradients are NaN or infinite; it is raised within `CHECK_EVERY` steps.
        """
        step, loader, device = self._steps.step, self._state.loader, self._options.device
        steps, max_skips = epoch.steps, self._options.max_skips
        start = last = shown = now(device)
        self._last_save = monotonic()
        batches = loader.raw_batches() if epoch.done < steps else iter(())
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except LowcalError:
                if signal := requested():  # to the whole process group, so that the loader's workers have ended too
                    self._count_time(epoch, start)
                    self._save()
                    raise Interrupted(signal) from None  # the other processes do not know of it
                raise
            if self._state.finished < self._options.warmup_epochs:
                self._set_lr((epoch.done + 1) / steps)
            loss = step(*batch)
            moment = perf_counter()
            epoch.add(loss, step.skipped, (loader.global_batch, *loader.shape), moment - last)
            last = moment
            if epoch.done % CHECK_EVERY == 0:
                epoch.check(max_skips)
            if progress and (epoch.done == steps or moment - shown >= SHOW_EVERY):
                shown = moment
                progress(self._progress(epoch, epoch.seconds + moment - start))
            # After the last step the loader must come to its end first: its state is then that of the next epoch.
            if epoch.done < steps and self._is_save_due():
                self._count_time(epoch, start)
                self._save_between_steps()
                start = last = now(device)
        is_save_due = self._is_save_due()
        self._count_time(epoch, start)
        if is_save_due:
            self._save_between_steps()

    def _lr_until(self, part: float) -> float:
        """SGD's learning rate in the step with which `part` of the epoch is done."""
        finished, warmup = self._state.finished, self._options.warmup_epochs
        rate = self._options.lr_at(finished) * self._growth.lr_factor
        return rate * (finished + part) / warmup if finished + part < warmup else rate

    def _set_lr(self, part: float) -> None:
        rate = self._lr_until(part)
        for param_group in self._state.train.optimizer.param_groups:
            param_group["lr"] = rate * param_group.get("lr_factor", 1.0)

    def _count_time(self, epoch: EpochState, start: float) -> None:
        """Adds the seconds since `start`, and checks the losses."""
        epoch.seconds += now(self._options.device) - start
        epoch.check(self._options.max_skips)

    def _is_save_due(self) -> bool:
        """Whether it is time to save, or a process has received a signal; all processes ask after each step."""
        self._signal = self._group.poll(requested())
        return self._signal > 0 or monotonic() - self._last_save >= self._save_every

    def _save_between_steps(self) -> None:
        """Saves, and ends the run if a process has received a signal."""
        self._save()
        if self._signal:
            self._stop(self._signal)
        self._last_save = monotonic()

    def _save(self, random: dict[str, Tensor] | None = None) -> None:
        """Saves the run within the epoch; `random` as in `RunState.save`."""
        self._record_peak()
        self._state.save(random)

    def _stop(self, signal: int) -> NoReturn:
        """Ends a run that is saved, as all processes have agreed."""
        if self._group.world > 1:
            self._group.barrier()  # rank 0 has then saved
            ignore_signals()  # torchrun sends one to the processes that are left when the first has ended
        raise Interrupted(signal)

    def _progress(self, epoch: EpochState, seconds: float) -> Progress:
        epochs_left = self._options.epochs - self._state.finished - 1
        return Progress(
            epoch=self._state.finished,
            epochs=self._options.epochs,
            step=epoch.done,
            steps=epoch.steps,
            loss=epoch.loss_so_far(),
            boundary=self._method.boundary,
            layers=len(self._method.layers),
            images_per_second=epoch.images / seconds,
            seconds_left=seconds / epoch.done * (epoch.steps - epoch.done + epoch.steps * epochs_left),
        )

    def _restart_with_smaller_batch(self) -> None:
        """Restores the start of the epoch, with the batch before the one on trial."""
        state = self._state
        self._growth.refuse()
        state.train.optimizer.zero_grad(set_to_none=True)
        state.restart_epoch()
        state.loader.batch = self._growth.batch
        self.rebuild()
        release_memory(self._options.device)
        state.save()
        self.news += (
            f"out of memory with batch {self._growth.refused}: epoch {state.finished + 1} began again with batch "
            f"{self._growth.batch}, which stays",
        )

    # The end of the epoch

    def _evaluated(self) -> dict[str, Any]:
        """Evaluates the network, or its mean; returns the epoch's record without the method's fields."""
        epoch, options = self._epoch, self._options
        with self._state.train.random.entered():
            loss = epoch.mean_loss()
            if not math.isfinite(loss):
                raise self._diverged("every step was skipped, the last", epoch.steps)
            self._record_peak()
            peak = self._group.max(epoch.peak)
            flops, peak = self._group.from_main(lambda: self._counted(peak))
            self._group.broadcast(self._model.buffers())  # running statistics, which each process takes of its shard
            with self._state.train.averaged():
                self._group.broadcast(self._model.buffers())  # those of the mean
                test_loss, top1_error = evaluate(
                    self._model,
                    self._test_batches(),
                    device=options.device,
                    precision=options.precision,
                    add_up=self._group.sum,
                )
                if self._keeps_best and math.isfinite(test_loss):
                    self._best.offer(self._model, self._state.finished, top1_error)
        if not math.isfinite(test_loss):
            raise self._diverged(f"the test loss is {test_loss}", epoch.steps)
        return {
            "epoch": self._state.finished,
            "boundary": self._method.boundary,
            "layers": len(self._method.layers),
            "step": self._state.step_mode or "eager",
            "train_loss": loss,
            "test_loss": test_loss,
            "top1_error": top1_error,
            **epoch.facts(),
            "total_seconds": self._state.seconds + epoch.seconds,
            "lr": self.lr,
            "batch": self._state.loader.batch,
            "refused_batch": self._growth.refused,
            "flops": flops,
            "peak_memory_bytes": peak,
        }

    def _counted(self, peak: int) -> tuple[int, int]:
        """The epoch's FLOPs, and the most bytes of a step."""
        fills, cache = 0, self._options.cache
        if cache is not None:
            records = self._state.folder.read_epochs()
            if not records or records[-1]["boundary"] != self._method.boundary:
                fills = min(cache.views or 1, self._options.epochs - self._state.finished)
        return self._meter.count(Counter(self._epoch.shapes), peak, fills=fills)

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images for evaluation; a signal ends it, and the run is saved as it was before."""
        random = self._state.train.random.state_dict()
        for batch in self.test:
            if signal := self._group.poll(requested()):
                with self._state.train.averaged():  # within evaluation: exchanges the mean and the weights back
                    self._save(random)
                self._stop(signal)
            yield batch

    def _end_epoch(self, record: dict[str, Any]) -> None:
        """Moves the boundary, lets the batch grow, writes the completed `record`, and saves."""
        state = self._state
        held = self._meter.held()
        changed = self._method.end_epoch(record["train_loss"])
        record |= self._method.facts()
        if self._growth.end_epoch(record["peak_memory_bytes"], held, moved=changed):
            state.loader.batch, changed = self._growth.batch, True
            self.news += (f"batch {self._growth.batch} from epoch {state.finished + 2} on",)
        if changed:
            self.rebuild()
        state.end_epoch()
        if self._group.is_main:
            state.folder.append(record)
        state.save()
        if self._keeps_best:
            self._best.settle(state.finished)
        state.is_broken = False

    @property
    def _epoch(self) -> EpochState:
        epoch = self._state.epoch
        assert epoch is not None  # between begin_epoch and end_epoch
        return epoch

    def _record_peak(self) -> None:
        self._epoch.peak = max(self._epoch.peak, self._meter.peak())

    def _diverged(self, what: str, step: int) -> LowcalError:
        where = f"{what} at step {step} of epoch {self._state.finished + 1} of {self._options.epochs}"
        if self._group.is_main:
            self._state.folder.note_divergence(where)
        return LowcalError(f"{where}; lower the learning rate, which is {self.lr:g} ({self._state.last_save()})")
