"""One training run: a method on a network, from the first epoch to the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lowcal.activations import FILE
from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.methods import Method
from lowcal.training.batch_growth import BatchGrowth
from lowcal.training.best import BestWeights
from lowcal.training.checkpoint import export_weights, settle
from lowcal.training.distributed import TrainingGroup
from lowcal.training.epoch import EpochLoop, Progress
from lowcal.training.run_folder import RunFolder
from lowcal.training.step_builder import StepBuilder
from lowcal.training.train_state import RunOptions, RunState, TrainState

__all__ = ["Progress", "Run", "RunOptions"]


class Run:
    """A training run, epoch by epoch. Several runs may take turns in one process.

    Each of several processes that train one network has its own run. They are in the same state, but their loaders
    return different shards of the images. Only rank 0 writes to the folder, which the others need not see.

    Args:
        model: the network, on the device.
        optimizer: the one that the method knows.
        method: attached to the network.
        train: the training images.
        test: the images for evaluation.
        folder: receives the records and the checkpoints.
        options: of the run.
        growth: decides the size of the mini-batches; None: it does not change.
        group: the processes that train the network; None: this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        train: Loader,
        test: Loader,
        folder: RunFolder,
        options: RunOptions,
        *,
        growth: BatchGrowth | None = None,
        group: TrainingGroup | None = None,
    ) -> None:
        self.model, self.method, self.train, self.folder = model, method, train, folder
        self.optimizer, self.options, self.group = optimizer, options, group or TrainingGroup()
        self._growth = growth or BatchGrowth(train.batch, most=train.batch)
        train_state = TrainState(model, optimizer, method, options)
        self.state = RunState(train_state, train, self._growth, folder, self.group, options)
        if self.group.is_main:
            folder.occupy()
        self._steps = StepBuilder(self.state)
        self._loop = EpochLoop(self.state, self._steps, test)

    @property
    def epochs(self) -> int:
        """Epochs in the whole run."""
        return self.options.epochs

    @property
    def finished(self) -> int:
        """Finished epochs."""
        return self.state.finished

    @property
    def done(self) -> bool:
        """Whether all epochs are finished."""
        return self.finished >= self.epochs

    @property
    def finished_steps(self) -> int:
        """Steps of the next epoch that were finished before the run was resumed."""
        return self.state.epoch.done if self.state.epoch else 0

    @property
    def news(self) -> tuple[str, ...]:
        """Notes for the user on the last epoch."""
        return self._loop.news

    def warm_up(self, steps: int = 3) -> tuple[str, ...]:
        """Trains copies of everything for a few steps, so that the time of the first epoch includes no start-up.

        With ``step="auto"`` this also chooses the fastest way to run a step, for the whole run.

        Returns:
            Notes for the user: what was chosen and why.
        """
        built = self.state.step_mode or "eager"
        full, last = (self._own(size) for size in (self._growth.proven, self.train.count % self.train.batch))
        note = self._steps.choose_mode(full)
        if self.state.step_mode != built:
            self._loop.rebuild()
        self._steps.try_steps(steps, full)
        if last:  # kernels are chosen, or built, for each size
            self._steps.try_steps(steps, last)
        return (note,) if note else ()

    def step_times(self, boundaries: Sequence[int]) -> dict[int, float]:
        """Seconds of a step at each boundary, on copies of everything; call `warm_up` before."""
        return self._steps.step_times(boundaries, self._own(self._growth.proven))

    def run_epoch(self, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates, and saves; returns the epoch's record as in `epochs.jsonl`.

        Args:
            progress: called a few times a second.

        Raises:
            LowcalError: the loss became NaN or infinite, the run is finished, or its last epoch was interrupted. The
                folder is then as the last checkpoint left it.
            Interrupted: one of the processes received a signal; the run is saved as it was after the last step.
        """
        if self.done:
            raise LowcalError(
                f"the run in {self.folder.path} has finished its {self.epochs} epochs; start a new run for more"
            )
        if self.state.is_broken:
            raise LowcalError(
                f"the run in {self.folder.path} was interrupted inside an epoch; resume it from its checkpoint"
            )
        return self._loop.run(progress)

    def resume(self) -> tuple[str, ...]:
        """Continues from the folder's newest whole checkpoint; to be called before anything else.

        Returns:
            Notes for the user: which newer checkpoints were skipped, and why.

        Raises:
            LowcalError: no checkpoint can be used, or it belongs to another run; this run is then unchanged.
        """
        found = self.group.from_main(self.state.newest)
        if found is None:
            self._settle_best()
            return ("no epoch had been finished; started from the first",)
        state, name, notes = found
        position = self.train.state_dict()
        try:
            self.state.load(state)
            self._loop.rebuild()
        except Exception as error:  # each part refuses what it cannot load with an error of its own
            self.train.load_state_dict(position)
            first_line = str(error).partition("\n")[0]
            raise LowcalError(
                f"{name} does not fit this run ({type(error).__name__}: {first_line}); "
                "resume with the lowcal and the recipe that wrote it"
            ) from error
        if self.group.is_main:
            settle(Path(name))
        self._settle_best()
        return notes

    def finish(self) -> dict[str, Any]:
        """Writes the network's weights and the folder's `summary.json`; returns the summary.

        If the run keeps a mean of the weights, that is what is written.

        Raises:
            LowcalError: there are epochs left.
        """
        if not self.done:
            raise LowcalError(
                f"the run in {self.folder.path} has finished {self.finished} of {self.epochs} epochs; continue it first"
            )

        def write() -> dict[str, Any]:
            with self.state.train.averaged():
                export_weights(self.model, self.folder.path)
            (self.folder.path / FILE).unlink(missing_ok=True)
            return self.folder.summarise(**self.method.results())  # last: its presence means that the run is finished

        return self.group.from_main(write)

    def _settle_best(self) -> None:
        if self.group.is_main:
            BestWeights(self.folder).settle(self.finished)

    def _own(self, images: int) -> int:
        """How many of a mini-batch's `images` are this process's."""
        shard = self.group.shard.of(images)
        return shard.stop - shard.start
