"""One training run: a method on a network, from epoch to epoch."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.training.checkpoint import settle
from lowcal.training.epoch import Progress, train_epoch
from lowcal.training.evaluate import evaluate
from lowcal.training.finish import export_weights, write_summary
from lowcal.training.growth import Growth, is_out_of_memory, release
from lowcal.training.interrupt import deferred, requested
from lowcal.training.learner import Learner
from lowcal.training.meter import Meter
from lowcal.training.part import DivergedError, Part
from lowcal.training.pause import SavingPause, stop
from lowcal.training.random_state import RandomState
from lowcal.training.ranks import Ranks
from lowcal.training.record import RunFolder
from lowcal.training.run_state import RunState
from lowcal.training.step import build_scaler
from lowcal.training.workbench import Workbench

__all__ = ["Progress", "Run"]


class Run:
    """A method on a network, epoch by epoch; several runs may take turns in one process.

    Several processes that train one network each have a run of it, all in the same state but for the share of the
    images that its loaders give. The main one's alone writes to the folder, which the others need not see.

    Args:
        model: the network, on `device`; the method is attached to it.
        optimizer: the one that the method knows.
        method: what is trained by.
        train: the training images.
        test: the images for evaluation.
        epochs: epochs in the whole run.
        lr_at: SGD's learning rate in a 0-based epoch.
        precision: "float32", "bf16" or "fp16".
        device: where everything is.
        folder: receives the records and the checkpoints.
        seed: of torch's global generators, as this run sees them.
        checkpoint: whether each epoch's end is saved.
        checkpoint_minutes: within an epoch it is saved as often as this; None: not.
        max_skips: steps that may be skipped in a row since their loss or gradient is NaN or infinite; 0: the run stops
            at the first loss that is.
        growth: decides the size of the mini-batches; None: it stays.
        step: how a step is run: "eager", "compiled", "graphed", or "auto", which `warm_up` chooses from these.
        ranks: the processes that train the network.

    Attributes:
        news: what a person should know of the last epoch.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        train: Loader,
        test: Loader,
        epochs: int,
        lr_at: Callable[[int], float],
        precision: str,
        device: torch.device | str,
        folder: RunFolder,
        seed: int,
        checkpoint: bool = True,
        checkpoint_minutes: float | None = 10.0,
        max_skips: int = 0,
        step: str = "eager",
        growth: Growth | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.train, self.test = train, test
        self.epochs, self.folder = epochs, folder
        self.precision, self.device = precision, torch.device(device)
        self.ranks = ranks or Ranks()
        self.news: tuple[str, ...] = ()
        self._lr_at = lr_at
        self._save_every = math.inf if checkpoint_minutes is None or not checkpoint else 60.0 * checkpoint_minutes
        self._max_skips = max_skips
        self._growth = growth or Growth(train.batch, most=train.batch)
        random, scaler = RandomState(seed, self.device), build_scaler(self.device, precision)
        self._learner = Learner(model, optimizer, method, scaler, random)
        self._workbench = Workbench(
            self._learner,
            train,
            ranks=self.ranks,
            device=self.device,
            precision=precision,
            seed=seed,
            guard=max_skips > 0,
            step=step,
        )
        self._state = RunState(
            learner=self._learner,
            train=train,
            growth=self._growth,
            workbench=self._workbench,
            folder=folder,
            ranks=self.ranks,
            device=self.device,
            seed=seed,
            epochs=epochs,
            is_saved=checkpoint,
        )
        if self.ranks.is_main:
            folder.occupy()
        self._step = self._workbench.build()
        self._meter = Meter(method, self.device, precision, self.ranks.world)

    @property
    def finished(self) -> int:
        """Epochs that are done."""
        return self._state.finished

    @property
    def done(self) -> bool:
        """Whether all epochs are finished."""
        return self.finished >= self.epochs

    @property
    def finished_steps(self) -> int:
        """Steps of the coming epoch that were done before the run was resumed."""
        return self._state.part.done if self._state.part else 0

    def warm_up(self, steps: int = 3) -> None:
        """Trains copies of everything for a few steps, so that the first epoch's time has no start-up in it.

        With ``step="auto"`` this also finds which way to run a step is the fastest, for the whole run.
        """
        whole, last = (self._own(size) for size in (self._growth.proven, self.train.count % self.train.batch))
        if self._workbench.choose(10 * steps, whole):
            self._renew()
        self._workbench.rehearse(steps, whole)
        if last:  # kernels are chosen, or built, for each size
            self._workbench.rehearse(steps, last)

    def run_epoch(self, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates, and saves; returns the epoch's record as in `epochs.jsonl`.

        Args:
            progress: called a few times a second.

        Raises:
            LowcalError: the loss became NaN or infinite, the run is finished, or its last epoch was broken off. The
                folder is then as the last checkpoint left it.
            Interrupted: a signal asked one of the processes for the end; the run is saved as it was at the end of the
                last step.
        """
        if self.done:
            raise LowcalError(
                f"the run in {self.folder.path} has finished its {self.epochs} epochs; give it more in a new one"
            )
        if not self._state.is_whole:
            raise LowcalError(
                f"the run in {self.folder.path} was broken off inside an epoch; resume it from its checkpoint"
            )
        self._state.is_whole = False
        self.news = ()
        with deferred():
            while (part := self._train(progress)) is None:
                self._shrink_batch()  # not in _train, where the error still holds on to the step's tensors
            record = self._record(part)
            self._move_on(part, record)
            if signal := self.ranks.most(requested()):
                stop(signal, self.ranks)
        return record

    def resume(self) -> tuple[str, ...]:
        """Goes on where the folder's newest whole checkpoint was saved; to be called before anything else.

        Returns:
            What a person should know: which newer checkpoints were passed over, and why.

        Raises:
            LowcalError: no checkpoint can be used, or it belongs to another run; this run is unchanged then.
        """
        found = self.ranks.from_main(self._state.newest)
        if found is None:
            return ("no epoch had been finished; started from the first",)
        state, name, notes = found
        batches = self.train.state_dict()
        try:
            self._state.load(state)
            self._renew()
        except Exception as error:  # each of the parts refuses what it cannot load with an error of its own
            self.train.load_state_dict(batches)
            first_line = str(error).partition("\n")[0]
            raise LowcalError(
                f"{name} does not fit this run ({type(error).__name__}: {first_line}); "
                "resume with the lowcal and the recipe that wrote it"
            ) from error
        if self.ranks.is_main:
            settle(Path(name))
        return notes

    def finish(self) -> dict[str, Any]:
        """Writes the network's weights and the folder's `summary.json`; returns what the latter holds.

        Raises:
            LowcalError: there are epochs left.
        """
        if not self.done:
            raise LowcalError(
                f"the run in {self.folder.path} has finished {self.finished} of {self.epochs} epochs; "
                "go on with it first"
            )

        def write() -> dict[str, Any]:
            export_weights(self.model, self.folder.path)
            return write_summary(self.folder)  # last: its presence says that the run is finished

        return self.ranks.from_main(write)

    # One epoch

    def _own(self, images: int) -> int:
        """How many of a mini-batch's `images` are this process's."""
        share = self.ranks.shard.of(images)
        return share.stop - share.start

    def _train(self, progress: Callable[[Progress], None] | None) -> Part | None:
        """Takes the epoch's steps; None if memory ran out in them and the batch is on trial."""
        at = self._state
        part = at.part or Part(len(self.train), self.device, in_a_row=at.in_a_row)
        at.part, at.saved_steps = None, part.done
        if self._growth.on_trial and at.before is None:
            at.keep_start()
            # In a step one process cannot tell the others, who wait for its gradients, that its memory ran out.
            if self.ranks.world > 1 and self.ranks.most(not self._workbench.has_memory()):
                return None
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.model.train()
        try:
            with self._learner.random.entered():
                self._meter.start()
                train_epoch(
                    self._step,
                    self.train,
                    part,
                    device=self.device,
                    epoch=self.finished,
                    epochs=self.epochs,
                    boundary=self.method.boundary,
                    layers=len(self.method.layers),
                    max_skips=self._max_skips,
                    progress=progress,
                    pause=SavingPause(self.ranks, self._save_every, lambda: self._save(part)),
                )
        except DivergedError as error:
            raise self._diverged(str(error), error.step) from None
        except Exception as error:
            if self._growth.on_trial and self.ranks.world == 1 and is_out_of_memory(error):
                return None
            raise
        return part

    def _record(self, part: Part) -> dict[str, Any]:
        """Evaluates the network; what the log says of the epoch, but for what the method makes of its end."""
        with self._learner.random.entered():
            loss = part.mean_loss()
            if not math.isfinite(loss):
                raise self._diverged("every step was skipped, the last", part.steps)
            flops, peak = self._costs(part)
            self.ranks.spread(self.model.buffers())  # running statistics, which each process makes of its share
            test_loss, top1_error = evaluate(
                self.model,
                self._interruptible(part),
                device=self.device,
                precision=self.precision,
                add_up=self.ranks.sum,
            )
        if not math.isfinite(test_loss):
            raise self._diverged(f"the test loss is {test_loss}", part.steps)
        return {
            "epoch": self.finished,
            "boundary": self.method.boundary,
            "layers": len(self.method.layers),
            "step": self._workbench.mode,
            "train_loss": loss,
            "test_loss": test_loss,
            "top1_error": top1_error,
            **part.facts(),
            "total_seconds": self._state.seconds + part.seconds,
            "lr": self._lr(),
            "batch": self.train.batch,
            "refused_batch": self._growth.refused,
            "flops": flops,
            "peak_memory_bytes": peak,
        }

    def _move_on(self, part: Part, record: dict[str, Any]) -> None:
        """Moves the boundary and lets the batch grow, writes the `record`, completed, and saves."""
        held = self._meter.held()
        changed = self.method.end_epoch(record["train_loss"])
        record |= self.method.facts()
        self._state.seconds, self._state.in_a_row = record["total_seconds"], part.in_a_row()
        if self._growth.end_epoch(record["peak_memory_bytes"], held, moved=changed):
            self.train.batch, changed = self._growth.batch, True
            self.news += (f"batch {self._growth.batch} from epoch {self.finished + 2} on",)
        self._state.before = None
        if changed:
            self._renew()
        self._state.finished += 1
        if self.ranks.is_main:
            self.folder.append(record)
        self._state.save(None)
        self._state.is_whole = True

    def _shrink_batch(self) -> None:
        """Takes the run back to the start of the epoch, with the batch that was before."""
        self._growth.refuse()
        self.optimizer.zero_grad(set_to_none=True)
        self._state.go_back()
        self.train.batch = self._growth.batch
        self._renew()
        release(self.device)
        self._state.save(None)
        self.news += (
            f"out of memory with batch {self._growth.refused}: epoch {self.finished + 1} began anew with batch "
            f"{self._growth.batch}, which stays",
        )

    def _costs(self, part: Part) -> tuple[int, int]:
        """FLOPs of the epoch's steps, and the most bytes on a device in one of them."""
        peak = self.ranks.most(max(part.peak, self._meter.peak()))
        return self.ranks.from_main(lambda: self._meter.count(part.shape_counts(), peak))

    def _interruptible(self, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """The images for evaluation; a signal ends it, with the run saved as it was before."""
        random = self._learner.random.state_dict()
        for batch in self.test:
            if signal := self.ranks.poll(requested()):
                self._save(part, random=random)
                stop(signal, self.ranks)
            yield batch

    def _diverged(self, what: str, step: int) -> LowcalError:
        where = f"{what} at step {step} of epoch {self.finished + 1} of {self.epochs}"
        if self.ranks.is_main:
            self.folder.note_divergence(where)
        return LowcalError(f"{where}; lower the learning rate, which is {self._lr():g} ({self._state.last_save()})")

    def _lr(self) -> float:
        """SGD's learning rate in the epoch that is next."""
        return self._lr_at(self.finished) * self._growth.lr_factor

    def _save(self, part: Part, *, random: dict[str, Tensor] | None = None) -> None:
        """Saves the run with `part` of the epoch done."""
        part.peak = max(part.peak, self._meter.peak())
        self._state.save(part, random=random)

    def _renew(self) -> None:
        """What depends on the network's shape and on what learns in it."""
        if self.ranks.world > 1:
            del self._step
            gc.collect()  # DDP's hooks on the parameters go with it
        self._step = self._workbench.build()
        self._meter.renew()
