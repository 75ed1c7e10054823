"""What a run depends on, and how that is saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.steps.modes import find_step
from lowcal.steps.step import StepOptions, build_scaler
from lowcal.training.batch_growth import BatchGrowth, cpu_copy
from lowcal.training.cached import CacheOptions
from lowcal.training.checkpoint import load_checkpoint, save_checkpoint
from lowcal.training.distributed import TrainingGroup
from lowcal.training.epoch_state import EpochState
from lowcal.training.random_state import RandomState
from lowcal.training.run_folder import RunFolder, digest
from lowcal.training.signals import renew_grace
from lowcal.training.weight_mean import WeightMean


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    Attributes:
        epochs: epochs in the whole run.
        lr_at: SGD's learning rate in an epoch, counted from 0, without the warm-up.
        warmup_epochs: epochs, or a part of one, in which the rate grows from step to step in proportion to the time.
        device: the device of the network and the mini-batches.
        precision: "float32", "bf16" or "fp16".
        seed: of torch's global random generators during this run.
        step: how a step runs: a mode of `steps.modes`, or "auto", of which `Run.warm_up` chooses the fastest.
        max_skips: steps in a row that may be skipped because their loss or gradient is NaN or infinite; 0: such a loss
            stops the run.
        max_norm: gradients with a larger norm over all parameters are scaled down to it; None: they are not clipped.
        label_smoothing: the part of the target that all classes share.
        ema_decay: of the exponential mean of the weights, with which the network is evaluated and exported; 0: there is
            none.
        cache: how frozen layers are computed once for each image; None: they are not.
        checkpoint: whether the run is saved at the end of each epoch.
        checkpoint_minutes: minutes between checkpoints within an epoch; None: none are saved there.
    """

    epochs: int
    lr_at: Callable[[int], float]
    device: torch.device
    precision: str = "float32"
    seed: int = 0
    warmup_epochs: float = 0.0
    step: str = "eager"
    max_skips: int = 0
    max_norm: float | None = None
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    cache: CacheOptions | None = None
    checkpoint: bool = True
    checkpoint_minutes: float | None = 10.0


class TrainState:
    """A network with all that its next training step depends on, except the images.

    Args:
        model: the network.
        optimizer: of its parameters.
        method: attached to both.
        options: those of the run.

    Attributes:
        scaler: of gradients, in half precision.
        random: torch's global generators during this run.
        mean: the exponential mean of the weights, if the run keeps one.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Method, options: RunOptions) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.scaler = build_scaler(options.device, options.precision)
        self.random = RandomState(options.seed, options.device)
        self.mean = WeightMean(model, options.ema_decay) if options.ema_decay else None
        self._options = options

    def copy(self, example: Tensor) -> TrainState:
        """A copy with the method at the same boundary and new generators; `example` is one image, (1, C, H, W)."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return TrainState(model, optimizer, self.method.twin(model, optimizer, example), self._options)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network has the mean of its weights, if there is one; see `WeightMean.exchanged`."""
        return self.mean.exchanged() if self.mean else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            "method": self.method.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "random": self.random.state_dict(),
            **({"mean": self.mean.state_dict()} if self.mean else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned. One that does not fit may be loaded in part, so try it on a copy first."""
        self.method.load_state_dict(state["method"])  # first: it may change the network's shape
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.random.load_state_dict(state["random"])
        if self.mean:
            self.mean.load_state_dict(state["mean"])


class RunState:
    """All that the next step of a run depends on, and the run's checkpoints.

    Args:
        train: the training state.
        loader: of the training images.
        growth: decides the size of the mini-batches.
        folder: holds the checkpoints, and the log that belongs to them.
        group: the processes that train the network; rank 0 saves.
        options: those of the run.

    Attributes:
        finished: number of finished epochs.
        seconds: training time of these epochs.
        step_mode: how a step runs; None until "auto" is decided.
        epoch: the epoch that has begun; None between epochs.
        is_broken: whether an epoch was left without its end, so that only a checkpoint can continue the run.
    """

    def __init__(
        self,
        train: TrainState,
        loader: Loader,
        growth: BatchGrowth,
        folder: RunFolder,
        group: TrainingGroup,
        options: RunOptions,
    ) -> None:
        self.train, self.loader, self.growth = train, loader, growth
        self.folder, self.group, self.options = folder, group, options
        self.finished = 0
        self.seconds = 0.0
        self.step_mode = options.step if options.step != "auto" else None if group.world == 1 else "eager"
        self.epoch: EpochState | None = None
        self.is_broken = False
        self._in_a_row = 0  # skipped steps at the end of the last finished epoch
        self._epoch_start: dict[str, Any] | None = None  # the run at the start of an epoch whose batch is on trial
        self._saved_steps = 0  # of the running epoch

    def begin_epoch(self) -> tuple[EpochState, bool]:
        """Begins the next epoch, or continues the one that a checkpoint was saved in.

        Returns:
            Its state, and whether the run has just been kept for `restart_epoch`, because the batch is on trial.
        """
        self.is_broken = True
        if self.epoch is None:
            self.epoch = EpochState(len(self.loader), self.options.device, in_a_row=self._in_a_row)
        self._saved_steps = self.epoch.done
        is_new_trial = self.growth.on_trial and self._epoch_start is None
        if is_new_trial:
            self._epoch_start = cpu_copy({"batches": self.loader.state_dict(), **self.train.state_dict()})
        return self.epoch, is_new_trial

    def restart_epoch(self) -> None:
        """Restores the run as it was at the start of the epoch whose batch is on trial."""
        assert self._epoch_start is not None
        self.train.load_state_dict(self._epoch_start)
        self.loader.load_state_dict(self._epoch_start["batches"])
        self._epoch_start = self.epoch = None

    def end_epoch(self) -> None:
        """Counts the running epoch as finished."""
        assert self.epoch is not None
        self.seconds, self._in_a_row = self.seconds + self.epoch.seconds, self.epoch.final_skips()
        self.finished += 1
        self._epoch_start = self.epoch = None

    def save(self, random: dict[str, Tensor] | None = None) -> None:
        """Saves the run between two epochs, or within one.

        Args:
            random: the states of torch's generators with which the run continues, if not the present ones.
        """
        renew_grace()
        if not self.options.checkpoint or not self.group.is_main:
            return
        if self.epoch is not None:
            self._saved_steps = self.epoch.done
        state = {
            "run": self._identity(),
            "finished": self.finished,
            "seconds": self.seconds,
            "ranks": self.group.world,
            "in_a_row": self._in_a_row,
            "step": self.step_mode or "eager",
            "part": None if self.epoch is None else self.epoch.state_dict(),
            "batches": self.loader.state_dict(),
            "growth": self.growth.state_dict(),
            "before": self._epoch_start,
            **self.train.state_dict(),
        }
        save_checkpoint(self.folder.path, state if random is None else {**state, "random": random})

    def newest(self) -> tuple[dict[str, Any], str, tuple[str, ...]] | None:
        """The newest whole checkpoint, its file, and notes for the user; None if no epoch is finished.

        Raises:
            LowcalError: no checkpoint can be used, or it belongs to another run.
        """
        checkpoint = load_checkpoint(self.folder.path)
        if checkpoint is None:
            # The first epoch's record may be there without its checkpoint.
            if self.is_broken or len(self.folder.read_epochs()) > 1:
                raise LowcalError(f"{self.folder.path} has no checkpoint; start a new run in another folder")
            self.folder.truncate(0)
            return None
        self._check_identity(checkpoint.state.get("run"), checkpoint.path)
        notes, world = checkpoint.skipped, checkpoint.state.get("ranks", 1)
        if world != self.group.world:
            notes += (f"saved by {world} process(es), goes on with {self.group.world}",)
        return checkpoint.state, str(checkpoint.path), notes

    def load(self, state: Mapping[str, Any]) -> None:
        """Loads a checkpoint's state after it was loaded into a copy, and cuts the log to its epochs."""
        trial = self.train.copy(self.loader.sample_input(1))
        trial.load_state_dict(state)
        trial.method.detach()
        seconds, finished, in_a_row = float(state["seconds"]), int(state["finished"]), int(state["in_a_row"])
        self.loader.load_state_dict(state["batches"])
        mode = state["step"] if self.group.world == 1 else str(self.step_mode)
        step_options = StepOptions(self.options.device, self.options.precision)
        find_step(mode).check(self.train.model, (self.train.optimizer,), self.train.method, step_options)
        epoch = None
        if state["part"] is not None:
            epoch = EpochState(len(self.loader), self.options.device)
            epoch.load_state_dict(state["part"])
        if self.group.is_main:
            self.folder.truncate(finished)
        self.growth.load_state_dict(state["growth"])
        self._epoch_start = state["before"]
        self.train.load_state_dict(state)
        self.step_mode = mode  # never measured again, so that the run continues bit for bit
        self.seconds, self.finished, self._in_a_row, self.epoch = seconds, finished, in_a_row, epoch

    def last_save(self) -> str:
        """Which step or epoch the last checkpoint is of, for an error message."""
        if not self.options.checkpoint or not (self.finished or self._saved_steps):
            return "nothing is saved"
        if self._saved_steps:
            return f"the last checkpoint is that of step {self._saved_steps} of this epoch"
        return f"the last checkpoint is that of epoch {self.finished}"

    def _identity(self) -> dict[str, Any]:
        """The fields by which a checkpoint is recognised as one of this run."""
        return {
            "method": self.train.method.name,
            "recipe": digest(self.folder.recipe),
            "seed": self.options.seed,
            "epochs": self.options.epochs,
        }

    def _check_identity(self, saved: Any, path: Path) -> None:
        """Refuses the checkpoint in the file `path` if `saved`, its identity, is that of another run."""
        own, saved = self._identity(), saved if isinstance(saved, dict) else {}
        if any(earlier["recipe"] == saved.get("recipe") for earlier in self.folder.earlier_recipes()):
            own |= {name: saved[name] for name in ("recipe", "epochs") if name in saved}
        for name, value in own.items():
            found = saved.get(name)
            if found != value:
                what = "differs" if name == "recipe" else f"is {found!r}, this run's is {value!r}"
                raise LowcalError(
                    f"{path} is of another run: its {name} {what}; choose another folder or resume that run"
                )
