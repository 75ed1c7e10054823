"""One training run: a method on a network, from epoch to epoch."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.training.checkpoint import load_checkpoint, save_checkpoint
from lowcal.training.cost import Cost, dry_cost, held_bytes
from lowcal.training.epoch import DivergedError, Progress, Trained, now, train_epoch
from lowcal.training.evaluate import evaluate
from lowcal.training.random_state import RandomState
from lowcal.training.record import RunFolder
from lowcal.training.step import Step, build_scaler, build_step

__all__ = ["Progress", "Run"]


class Run:
    """A method on a network, epoch by epoch; several runs may take turns in one process.

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
        step: how a step is run; "eager".

    Attributes:
        finished: epochs that are done.
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
        step: str = "eager",
    ) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.train, self.test = train, test
        self.epochs, self.seed, self.folder = epochs, seed, folder
        self.device = torch.device(device)
        self.precision = precision
        self.finished = 0
        self._lr_at = lr_at
        self._checkpoint = checkpoint
        self._mode = step
        self._seconds = 0.0
        self._random = RandomState(seed, self.device)
        self._scaler = build_scaler(self.device, precision)
        self._step = self._build_step(model, optimizer, method, self._scaler)
        self._costs: dict[tuple[int, ...], Cost] = {}
        self._is_whole = True  # False from an epoch's start to its end: a part of an epoch cannot be gone on from

    @property
    def done(self) -> bool:
        """Whether all epochs are finished."""
        return self.finished >= self.epochs

    def warm_up(self, steps: int = 3) -> None:
        """Trains copies of everything for a few steps, so that the first epoch's time has no start-up in it."""
        before = self.train.state_dict()
        images, labels = next(iter(self.train))
        self.train.load_state_dict(before)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            model, optimizer, method = self._copies(images[:1])
            model.train()
            step = self._build_step(model, optimizer, method, build_scaler(self.device, self.precision))
            for _ in range(steps):
                step(images, labels)
            method.detach()
        now(self.device)

    def run_epoch(self, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates, and saves; returns the epoch's record as in `epochs.jsonl`.

        Args:
            progress: called a few times a second.

        Raises:
            LowcalError: the loss became NaN or infinite, the run is finished, or its last epoch was broken off. The
                folder is then as the last finished epoch left it.
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
        epoch, boundary, lr = self.finished, self.method.boundary, self._lr_at(self.finished)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._random.entered():
            others = self._mark_memory()
            trained = self._train(progress)
            flops, peak = self._count(trained.shapes, others)
            test_loss, top1_error = evaluate(self.model, self.test, device=self.device, precision=self.precision)
        if not math.isfinite(test_loss):
            raise self._diverged(f"the test loss is {test_loss}", trained.steps)
        changed = self.method.end_epoch(trained.loss)
        self._seconds += trained.seconds
        record = {
            "epoch": epoch,
            "boundary": boundary,
            "layers": len(self.method.layers),
            "train_loss": trained.loss,
            "test_loss": test_loss,
            "top1_error": top1_error,
            "seconds": trained.seconds,
            "total_seconds": self._seconds,
            "steps": trained.steps,
            "step_ms": trained.step_ms,
            "images_per_second": trained.images / trained.seconds,
            "lr": lr,
            "batch": self.train.batch,
            "flops": flops,
            "peak_memory_bytes": peak,
            **self.method.facts(),
        }
        if changed:
            self._step = self._build_step(self.model, self.optimizer, self.method, self._scaler)
            self._costs.clear()
        self.finished += 1
        self.folder.append(record)
        if self._checkpoint:
            save_checkpoint(self.folder.path, self._state_dict())
        self._is_whole = True
        return record

    def resume(self) -> tuple[str, ...]:
        """Goes on where the folder's newest whole checkpoint was saved; to be called before anything else.

        Returns:
            What a person should know: which newer checkpoints were passed over, and why.

        Raises:
            LowcalError: no checkpoint can be used, or it belongs to another run; this run is unchanged then.
        """
        checkpoint = load_checkpoint(self.folder.path)
        if checkpoint is None:
            # The first epoch's record may be there without its checkpoint.
            if not self._is_whole or len(self.folder.read_epochs()) > 1:
                raise LowcalError(f"{self.folder.path} has no checkpoint; start the run anew in another folder")
            self.folder.truncate(0)
            return ("no epoch had been finished; started from the first",)
        state, path = checkpoint.state, checkpoint.path
        self._check_identity(state, path)
        try:
            copies = self._copies(self.train.example(1))
            scaler = build_scaler(self.device, self.precision)
            self._load(state, *copies, scaler, RandomState(self.seed, self.device))
            copies[-1].detach()
            seconds, finished = float(state["seconds"]), int(state["finished"])
            self.train.load_state_dict(state["batches"])
            self.folder.truncate(finished)
        except Exception as error:  # each of the parts refuses what it cannot load with an error of its own
            first_line = str(error).partition("\n")[0]
            raise LowcalError(
                f"{path} does not fit this run ({type(error).__name__}: {first_line}); "
                "resume with the lowcal and the recipe that wrote it"
            ) from error
        self._load(state, self.model, self.optimizer, self.method, self._scaler, self._random)
        self._seconds, self.finished = seconds, finished
        self._step = self._build_step(self.model, self.optimizer, self.method, self._scaler)
        self._costs.clear()
        self._is_whole = True
        return checkpoint.passed_over

    def finish(self) -> dict[str, Any]:
        """Writes the folder's `summary.json` and returns what it holds.

        Raises:
            LowcalError: there are epochs left.
        """
        if not self.done:
            raise LowcalError(
                f"the run in {self.folder.path} has finished {self.finished} of {self.epochs} epochs; "
                "go on with it first"
            )
        records = self.folder.read_epochs()
        last = records[-1]
        errors = [record["top1_error"] for record in records]
        summary = {
            **self.folder.read_identity(),
            "top1_error": last["top1_error"],
            "best_top1_error": min(errors),
            "seconds": last["total_seconds"],
            "flops": sum(record["flops"] for record in records),
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
            "boundary": last["boundary"],
            "layers": last["layers"],
        }
        return self.folder.write_summary(summary)

    # One epoch

    def _train(self, progress: Callable[[Progress], None] | None) -> Trained:
        self.model.train()
        try:
            return train_epoch(
                self._step,
                self.train,
                device=self.device,
                epoch=self.finished,
                epochs=self.epochs,
                boundary=self.method.boundary,
                layers=len(self.method.layers),
                progress=progress,
            )
        except DivergedError as error:
            raise self._diverged(f"the training loss became {error.loss}", error.step) from None

    def _diverged(self, what: str, step: int) -> LowcalError:
        kept = (
            f"the last checkpoint is that of epoch {self.finished}"
            if self._checkpoint and self.finished
            else "nothing is saved"
        )
        return LowcalError(
            f"{what} at step {step} of epoch {self.finished + 1} of {self.epochs}; "
            f"lower the learning rate, which is {self._lr_at(self.finished):g} ({kept})"
        )

    def _count(self, shapes: Counter[tuple[int, ...]], others: int) -> tuple[int, int]:
        """FLOPs of an epoch's steps, and the most memory that one of them takes."""
        for shape in shapes:
            if shape not in self._costs:
                self._costs[shape] = dry_cost(self.method, shape, precision=self.precision)
        flops = sum(self._costs[shape].flops * count for shape, count in shapes.items())
        if self.device.type == "cuda":
            return flops, torch.cuda.max_memory_allocated(self.device) - others
        return flops, max(self._costs[shape].peak_bytes for shape in shapes)

    def _mark_memory(self) -> int:
        """Starts the count of peak memory; returns the bytes that belong to data sets and to other runs."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device) - held_bytes(self.model, self.optimizer)

    # Building and saving

    def _build_step(self, model: nn.Module, optimizer: Optimizer, method: Method, scaler: GradScaler | None) -> Step:
        return build_step(
            self._mode, model, optimizer, method, device=self.device, precision=self.precision, scaler=scaler
        )

    def _copies(self, example: Tensor) -> tuple[nn.Module, Optimizer, Method]:
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return model, optimizer, self.method.twin(model, optimizer, example)

    def _identity(self) -> dict[str, Any]:
        recipe = hashlib.sha256(self.folder.recipe.encode()).hexdigest()
        return {"method": self.method.name, "recipe": recipe, "seed": self.seed, "epochs": self.epochs}

    def _check_identity(self, state: Mapping[str, Any], path: Path) -> None:
        saved = state.get("run")
        for name, own in self._identity().items():
            value = saved.get(name) if isinstance(saved, dict) else None
            if value != own:
                found = "differs" if name == "recipe" else f"is {value!r}, this run's is {own!r}"
                raise LowcalError(
                    f"{path} is of another run: its {name} {found}; choose another folder or resume that run"
                )

    def _state_dict(self) -> dict[str, Any]:
        return {
            "run": self._identity(),
            "finished": self.finished,
            "seconds": self._seconds,
            "method": self.method.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler else None,
            "batches": self.train.state_dict(),
            "random": self._random.state_dict(),
        }

    @staticmethod
    def _load(
        state: Mapping[str, Any],
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        scaler: GradScaler | None,
        random: RandomState,
    ) -> None:
        method.load_state_dict(state["method"])  # first: it may give the network another shape
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler:
            scaler.load_state_dict(state["scaler"])
        random.load_state_dict(state["random"])
