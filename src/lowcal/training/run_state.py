"""Where a run is, saved and loaded as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.training.checkpoint import load_checkpoint, save_checkpoint
from lowcal.training.growth import Growth, kept_apart
from lowcal.training.interrupt import renew_grace
from lowcal.training.learner import Learner
from lowcal.training.part import Part
from lowcal.training.ranks import Ranks
from lowcal.training.record import RunFolder, digest
from lowcal.training.workbench import Workbench


class RunState:
    """All that the next step of a run depends on.

    Args:
        learner: what training changes.
        train: the training images.
        growth: of the mini-batches.
        workbench: knows how a step is run.
        folder: holds the checkpoints, and the log that goes with them.
        ranks: the processes that train the network; the main one saves.
        device: where the losses are.
        seed: of the run.
        epochs: in the whole run.
        is_saved: whether checkpoints are written.

    Attributes:
        finished: epochs that are done.
        seconds: of training in them.
        in_a_row: skipped steps with which the last of them ended.
        is_whole: False from an epoch's start to its end: a broken-off run cannot be gone on from.
        part: of the epoch that a checkpoint was saved in.
        before: the run at the start of an epoch whose batch is on trial.
        saved_steps: of the running epoch.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        train: Loader,
        growth: Growth,
        workbench: Workbench,
        folder: RunFolder,
        ranks: Ranks,
        device: torch.device,
        seed: int,
        epochs: int,
        is_saved: bool,
    ) -> None:
        self.finished = 0
        self.seconds = 0.0
        self.in_a_row = 0
        self.is_whole = True
        self.part: Part | None = None
        self.before: dict[str, Any] | None = None
        self.saved_steps = 0
        self._learner, self._train, self._growth, self._workbench = learner, train, growth, workbench
        self._folder, self._ranks, self._device = folder, ranks, device
        self._seed, self._epochs, self._is_saved = seed, epochs, is_saved

    def save(self, part: Part | None, *, random: dict[str, Tensor] | None = None) -> None:
        """Saves the run at the end of an epoch (None), or with `part` of the next one done.

        Args:
            random: what torch's generators are to be when the run goes on, if not as they are now.
        """
        renew_grace()
        if not self._is_saved or not self._ranks.is_main:
            return
        if part is not None:
            self.saved_steps = part.done
        state = {
            "run": self._identity(),
            "finished": self.finished,
            "seconds": self.seconds,
            "ranks": self._ranks.world,
            "in_a_row": self.in_a_row,
            "step": self._workbench.mode,
            "part": None if part is None else part.state_dict(),
            "batches": self._train.state_dict(),
            "growth": self._growth.state_dict(),
            "before": self.before,
            **self._learner.state_dict(),
        }
        save_checkpoint(self._folder.path, state if random is None else {**state, "random": random})

    def newest(self) -> tuple[dict[str, Any], str, tuple[str, ...]] | None:
        """The newest whole checkpoint, its file, and what a person should know; None if the first epoch is to come."""
        checkpoint = load_checkpoint(self._folder.path)
        if checkpoint is None:
            # The first epoch's record may be there without its checkpoint.
            if not self.is_whole or len(self._folder.read_epochs()) > 1:
                raise LowcalError(f"{self._folder.path} has no checkpoint; start the run anew in another folder")
            self._folder.truncate(0)
            return None
        self._check_identity(checkpoint.state.get("run"), checkpoint.path)
        notes, before = checkpoint.passed_over, checkpoint.state.get("ranks", 1)
        if before != self._ranks.world:
            notes += (f"saved by {before} process(es), goes on with {self._ranks.world}",)
        return checkpoint.state, str(checkpoint.path), notes

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a checkpoint's state, once copies have shown that all of it fits, and cuts the log to it."""
        twin = self._workbench.twin(self._train.sample_input(1))
        twin.load_state_dict(state)
        twin.method.detach()
        seconds, finished, in_a_row = float(state["seconds"]), int(state["finished"]), int(state["in_a_row"])
        self._train.load_state_dict(state["batches"])
        mode = state["step"] if self._ranks.world == 1 else self._workbench.mode
        self._workbench.check(mode)
        part = None
        if state["part"] is not None:
            part = Part(len(self._train), self._device)
            part.load_state_dict(state["part"])
        if self._ranks.is_main:
            self._folder.truncate(finished)
        self._growth.load_state_dict(state["growth"])
        self.before = state["before"]
        self._learner.load_state_dict(state)
        self._workbench.keep(mode)  # never measured again, so that the run goes on bit for bit
        self.seconds, self.finished, self.in_a_row, self.part = seconds, finished, in_a_row, part

    def keep_start(self) -> None:
        """Keeps the run as it is at the start of an epoch, for `go_back`."""
        self.before = kept_apart({"batches": self._train.state_dict(), **self._learner.state_dict()})

    def go_back(self) -> None:
        """Takes the run back to where `keep_start` was called."""
        assert self.before is not None  # as the batch is on trial
        self._learner.load_state_dict(self.before)
        self._train.load_state_dict(self.before["batches"])
        self.before = None

    def last_save(self) -> str:
        """Says of which step or epoch the last checkpoint is."""
        if not self._is_saved or not (self.finished or self.saved_steps):
            return "nothing is saved"
        if self.saved_steps:
            return f"the last checkpoint is that of step {self.saved_steps} of this epoch"
        return f"the last checkpoint is that of epoch {self.finished}"

    def _identity(self) -> dict[str, Any]:
        """By what a checkpoint is known to be of the same run."""
        recipe = digest(self._folder.recipe)
        return {"method": self._learner.method.name, "recipe": recipe, "seed": self._seed, "epochs": self._epochs}

    def _check_identity(self, saved: Any, path: Path) -> None:
        """Refuses the checkpoint in the file `path`, which says that it is of the run `saved`, if that is another."""
        own, saved = self._identity(), saved if isinstance(saved, dict) else {}
        if any(earlier["recipe"] == saved.get("recipe") for earlier in self._folder.earlier_recipes()):
            own |= {name: saved[name] for name in ("recipe", "epochs") if name in saved}
        for name, value in own.items():
            found = saved.get(name)
            if found != value:
                what = "differs" if name == "recipe" else f"is {found!r}, this run's is {value!r}"
                raise LowcalError(
                    f"{path} is of another run: its {name} {what}; choose another folder or resume that run"
                )
