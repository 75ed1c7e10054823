"""One training run: a method on a network, from epoch to epoch."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.synced_norm import separate
from lowcal.training.checkpoint import load_checkpoint, save_checkpoint, settle
from lowcal.training.epoch import Progress, now, train_epoch
from lowcal.training.evaluate import evaluate
from lowcal.training.finish import export_weights, write_summary
from lowcal.training.growth import Growth, is_out_of_memory, kept_apart, release
from lowcal.training.interrupt import Interrupted, deferred, end, requested
from lowcal.training.meter import Meter
from lowcal.training.modes import build_step, candidates, fastest, find_step
from lowcal.training.part import DivergedError, Part
from lowcal.training.random_state import RandomState
from lowcal.training.ranked_step import RankedStep
from lowcal.training.ranks import Ranks
from lowcal.training.record import RunFolder
from lowcal.training.resume import Learner, check_identity, identity
from lowcal.training.step import Step, build_scaler

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
        finished: epochs that are done.
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
        self.ranks = ranks or Ranks()
        self.model, self.optimizer, self.method = model, optimizer, method
        self.train, self.test = train, test
        self.epochs, self.seed, self.folder = epochs, seed, folder
        self.device = torch.device(device)
        self.precision = precision
        self.finished = 0
        self.news: tuple[str, ...] = ()
        self._lr_at = lr_at
        self._checkpoint = checkpoint
        self._save_every = math.inf if checkpoint_minutes is None or not checkpoint else 60.0 * checkpoint_minutes
        self._max_skips = max_skips
        self._modes = candidates(self.device) if step == "auto" and self.ranks.world == 1 else (step,)
        self._mode = "eager" if step == "auto" else step
        self._growth = growth or Growth(train.batch, most=train.batch)
        self._before: dict[str, Any] | None = None  # the run at the start of an epoch whose batch is on trial
        self._seconds = 0.0
        self._in_a_row = 0  # skipped steps with which the last epoch ended
        self._part: Part | None = None  # of the epoch that a checkpoint was saved in
        self._saved_steps = 0  # of the running epoch
        random, scaler = RandomState(seed, self.device), build_scaler(self.device, precision)
        self._learner = Learner(model, optimizer, method, scaler, random)
        self._step = self._build_step(self._learner, self.ranks)
        self._meter = Meter(method, self.device, precision, self.ranks.world)
        self._is_whole = True  # False from an epoch's start to its end: a broken-off run cannot be gone on from

    @property
    def done(self) -> bool:
        """Whether all epochs are finished."""
        return self.finished >= self.epochs

    @property
    def finished_steps(self) -> int:
        """Steps of the coming epoch that were done before the run was resumed."""
        return self._part.done if self._part else 0

    def warm_up(self, steps: int = 3) -> None:
        """Trains copies of everything for a few steps, so that the first epoch's time has no start-up in it.

        With ``step="auto"`` this also finds which way to run a step is the fastest, for the whole run.
        """
        share = self.ranks.share.of(self._growth.proven)
        most = share.stop - share.start
        if len(self._modes) > 1:
            self._mode = fastest(self._modes, lambda mode: self._rehearse(10 * steps, most, mode=mode))
            self._modes = (self._mode,)
            self._renew()
        self._rehearse(steps, most)

    def _rehearse(self, steps: int, most: int | None = None, *, alone: bool = False, mode: str | None = None) -> float:
        """Trains copies of everything on the coming mini-batch's first `most` images; `alone`: without other ranks.

        Returns:
            Seconds of a step: the mean of the second half of `steps`.
        """
        before = self.train.state_dict()
        images, labels = (part[:most] for part in next(iter(self.train)))
        self.train.load_state_dict(before)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            twin = self._twin(images[:1])
            twin.model.train()
            if alone:
                separate(twin.model)
            try:
                step = self._build_step(twin, Ranks(), mode)
                for index in range(steps):
                    if index == steps // 2:
                        start = now(self.device)
                    step(images, labels)
                return (now(self.device) - start) / (steps - steps // 2)
            finally:
                twin.method.detach()

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
        if not self._is_whole:
            raise LowcalError(
                f"the run in {self.folder.path} was broken off inside an epoch; resume it from its checkpoint"
            )
        self._is_whole = False
        self.news = ()
        epoch, boundary = self.finished, self.method.boundary
        with deferred():
            while (part := self._train(progress)) is None:
                self._shrink_batch()  # not in _train, where the error still holds on to the step's tensors
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
            held = self._meter.held()
            changed = self.method.end_epoch(loss)
            self._seconds += part.seconds
            record = {
                "epoch": epoch,
                "boundary": boundary,
                "layers": len(self.method.layers),
                "step": self._mode,
                "train_loss": loss,
                "test_loss": test_loss,
                "top1_error": top1_error,
                **part.facts(),
                "total_seconds": self._seconds,
                "lr": self._lr(),
                "batch": self.train.batch,
                "refused_batch": self._growth.refused,
                "flops": flops,
                "peak_memory_bytes": peak,
                **self.method.facts(),
            }
            self._in_a_row = part.in_a_row()
            if self._growth.end_epoch(peak, held, moved=changed):
                self.train.batch, changed = self._growth.batch, True
                self.news += (f"batch {self._growth.batch} from epoch {epoch + 2} on",)
            self._before = None
            if changed:
                self._renew()
            self.finished += 1
            if self.ranks.is_main:
                self.folder.append(record)
            self._save(None)
            self._is_whole = True
            if signal := self.ranks.most(requested()):
                self._end(signal)
        return record

    def resume(self) -> tuple[str, ...]:
        """Goes on where the folder's newest whole checkpoint was saved; to be called before anything else.

        Returns:
            What a person should know: which newer checkpoints were passed over, and why.

        Raises:
            LowcalError: no checkpoint can be used, or it belongs to another run; this run is unchanged then.
        """
        found = self.ranks.from_main(self._newest)
        if found is None:
            return ("no epoch had been finished; started from the first",)
        state, name, notes = found
        batches = self.train.state_dict()
        try:
            self._take(state)
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

    def _train(self, progress: Callable[[Progress], None] | None) -> Part | None:
        """Takes the epoch's steps; None if memory ran out in them and the batch is on trial."""
        part = self._part or Part(len(self.train), self.device, in_a_row=self._in_a_row)
        self._part, self._saved_steps = None, part.done
        if self._growth.on_trial and self._before is None:
            self._before = kept_apart({"batches": self.train.state_dict(), **self._learner.state_dict()})
            # In a step one process cannot tell the others, who wait for its gradients, that its memory ran out.
            if self.ranks.world > 1 and self.ranks.most(not self._has_memory()):
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
                    pause=_Saving(self, part),
                )
        except DivergedError as error:
            raise self._diverged(str(error), error.step) from None
        except Exception as error:
            if self._growth.on_trial and self.ranks.world == 1 and is_out_of_memory(error):
                return None
            raise
        return part

    def _has_memory(self) -> bool:
        """Whether this process by itself can take a step with its share of the batch."""
        try:
            self._rehearse(1, alone=True)
        except Exception as error:
            if is_out_of_memory(error):
                return False
            raise
        return True

    def _shrink_batch(self) -> None:
        """Takes the run back to the start of the epoch, with the batch that was before."""
        assert self._before is not None  # as the batch is on trial
        self._growth.refuse()
        self.optimizer.zero_grad(set_to_none=True)
        self._learner.load_state_dict(self._before)
        self.train.load_state_dict(self._before["batches"])
        self.train.batch, self._before = self._growth.batch, None
        self._renew()
        release(self.device)
        self._save(None)
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
                self._end(signal)
            yield batch

    def _end(self, signal: int) -> NoReturn:
        """Ends the run, which is saved, as all processes have agreed."""
        if self.ranks.world > 1:
            self.ranks.wait()  # for the main one, which saves
            end()  # torchrun sends a signal to those that are still there when the first has gone
        raise Interrupted(signal)

    def _diverged(self, what: str, step: int) -> LowcalError:
        if not self._checkpoint or not (self.finished or self._saved_steps):
            kept = "nothing is saved"
        elif self._saved_steps:
            kept = f"the last checkpoint is that of step {self._saved_steps} of this epoch"
        else:
            kept = f"the last checkpoint is that of epoch {self.finished}"
        return LowcalError(
            f"{what} at step {step} of epoch {self.finished + 1} of {self.epochs}; "
            f"lower the learning rate, which is {self._lr():g} ({kept})"
        )

    def _lr(self) -> float:
        """SGD's learning rate in the epoch that is next."""
        return self._lr_at(self.finished) * self._growth.lr_factor

    # Building, saving and loading

    def _build_step(self, learner: Learner, ranks: Ranks, mode: str | None = None) -> Step:
        guard = self._max_skips > 0
        if ranks.world > 1:
            return RankedStep(
                learner.optimizer,
                learner.method,
                ranks=ranks,
                precision=self.precision,
                scaler=learner.scaler,
                guard=guard,
            )
        return build_step(
            mode or self._mode,
            learner.model,
            learner.optimizer,
            learner.method,
            device=self.device,
            precision=self.precision,
            scaler=learner.scaler,
            guard=guard,
            batch=self.train.batch,
        )

    def _renew(self) -> None:
        """What depends on the network's shape and on what learns in it."""
        if self.ranks.world > 1:
            del self._step
            gc.collect()  # DDP's hooks on the parameters go with it
        self._step = self._build_step(self._learner, self.ranks)
        self._meter.renew()

    def _twin(self, example: Tensor) -> Learner:
        return self._learner.twin(example, seed=self.seed, device=self.device, precision=self.precision)

    def _identity(self) -> dict[str, Any]:
        return identity(self.folder, method=self.method.name, seed=self.seed, epochs=self.epochs)

    def _save(self, part: Part | None, *, random: dict[str, Tensor] | None = None) -> None:
        """Saves the run at the end of an epoch (None), or with `part` of the next one done."""
        if not self._checkpoint or not self.ranks.is_main:
            return
        if part is not None:
            part.peak = max(part.peak, self._meter.peak())
            self._saved_steps = part.done
        state = {
            "run": self._identity(),
            "finished": self.finished,
            "seconds": self._seconds,
            "ranks": self.ranks.world,
            "in_a_row": self._in_a_row,
            "step": self._mode,
            "part": None if part is None else part.state_dict(),
            "batches": self.train.state_dict(),
            "growth": self._growth.state_dict(),
            "before": self._before,
            **self._learner.state_dict(),
        }
        save_checkpoint(self.folder.path, state if random is None else {**state, "random": random})

    def _newest(self) -> tuple[dict[str, Any], str, tuple[str, ...]] | None:
        """The newest whole checkpoint, its file, and what a person should know; None if the first epoch is to come."""
        checkpoint = load_checkpoint(self.folder.path)
        if checkpoint is None:
            # The first epoch's record may be there without its checkpoint.
            if not self._is_whole or len(self.folder.read_epochs()) > 1:
                raise LowcalError(f"{self.folder.path} has no checkpoint; start the run anew in another folder")
            self.folder.truncate(0)
            return None
        check_identity(checkpoint.state.get("run"), self._identity(), checkpoint.path)
        notes, before = checkpoint.passed_over, checkpoint.state.get("ranks", 1)
        if before != self.ranks.world:
            notes += (f"saved by {before} process(es), goes on with {self.ranks.world}",)
        return checkpoint.state, str(checkpoint.path), notes

    def _take(self, state: dict[str, Any]) -> None:
        """Takes over a checkpoint's state, once copies have shown that all of it fits."""
        twin = self._twin(self.train.example(1))
        twin.load_state_dict(state)
        twin.method.detach()
        seconds, finished, in_a_row = float(state["seconds"]), int(state["finished"]), int(state["in_a_row"])
        self.train.load_state_dict(state["batches"])
        mode = state["step"] if self.ranks.world == 1 else self._mode
        find_step(mode).check(self.model, self.optimizer, self.method, self.device)
        part = None
        if state["part"] is not None:
            part = Part(len(self.train), self.device)
            part.load_state_dict(state["part"])
        self._growth.load_state_dict(state["growth"])
        self._before = state["before"]
        if self.ranks.is_main:
            self.folder.truncate(finished)
        self._learner.load_state_dict(state)
        self._mode, self._modes = mode, (mode,)  # never measured again, so that the run goes on bit for bit
        self._seconds, self.finished, self._in_a_row, self._part = seconds, finished, in_a_row, part
        self._renew()


class _Saving:
    """The `Pause` between steps in which a run saves, because it is time or because a signal came."""

    def __init__(self, run: Run, part: Part) -> None:
        self._run, self._part = run, part
        self._last = monotonic()
        self._signal = 0
        self._is_alone = False

    def is_due(self) -> bool:
        self._signal = self._run.ranks.poll(requested())
        return self._signal > 0 or monotonic() - self._last >= self._run._save_every

    def is_urgent(self) -> bool:
        self._is_alone = requested() > 0  # the other processes do not know
        return self._is_alone

    def __call__(self) -> None:
        self._run._save(self._part)
        if self._signal:
            self._run._end(self._signal)
        if self._is_alone:
            raise Interrupted(requested())
        self._last = monotonic()
