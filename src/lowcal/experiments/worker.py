"""One worker of a sweep: takes trials until there are none, trains them, and enters their results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch

from lowcal.data import Dataset
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.compare import train_in_turn
from lowcal.experiments.folders import refuse_another_recipe
from lowcal.experiments.lease import Lease, LostTrialError
from lowcal.experiments.ledger import MOST_DEATHS, Entry, Ledger
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, show_value
from lowcal.experiments.sampling import Study
from lowcal.experiments.search import decode
from lowcal.training.run_folder import RunFolder

if TYPE_CHECKING:
    from lowcal.experiments.sweep import Sweep

MEANS = ("top1_error", "best_top1_error", "seconds", "flops", "boundary", "layers")
LOOK_AGAIN = 2.0  # seconds at most, while others work on the last trials


@dataclass(frozen=True)
class TrialArm(Arm):
    """One run of a trial."""

    trial: int = 0

    @property
    def folder(self) -> str:
        """The name of its run folder within the sweep's."""
        return f"trial-{self.trial:04}-seed{self.seed}"


class Worker:
    """Works on a sweep.

    Args:
        plan: the sweep.
        out: its folder.
        ledger: who does what.
        study: chooses the settings.
        data: the images under the plan's own recipe.
    """

    def __init__(
        self,
        plan: Sweep,
        out: Path,
        ledger: Ledger,
        study: Study,
        *,
        data: Dataset,
        data_dir: Path | None,
        device: torch.device,
        watcher: Watcher,
    ) -> None:
        self._plan, self._out, self._ledger, self._study = plan, out, ledger, study
        self._data, self._data_of, self._data_dir = data, plan.recipe.data, data_dir
        self._device, self._watcher = device, watcher
        self._told: set[int] = set()

    def work(self) -> None:
        """Take trials until all of the sweep are finished, also those that other workers have now."""
        waits = False
        while True:
            entry = self._ledger.claim()
            if entry is not None:
                waits = False
                self._do(entry)
                continue
            left = sum(entry.outcome is None for entry in self._ledger.entries())
            if not left:
                break
            if not waits:
                self._watcher.note(f"waiting for {left} trial{'s' * (left > 1)} of other workers")
                waits = True
            time.sleep(min(LOOK_AGAIN, self._ledger.lease / 4))
        self._tell_all()

    def rows(self) -> list[dict[str, Any]]:
        """The finished trials' settings and results, in the order of their numbers."""
        return [
            {"trial": entry.trial, "settings": dict(entry.chosen), **entry.outcome}
            for entry in self._ledger.entries()
            if entry.outcome is not None
        ]

    def _do(self, entry: Entry) -> None:
        if entry.deaths:
            self._watcher.note(f"trial {entry.trial} is taken up again: its worker stopped")
        lease = Lease(self._ledger, entry.trial, self._watcher)
        deaths = entry.deaths  # of a worker that is stopped by hand: nothing is held against the trial
        try:
            with lease:
                outcome = self._outcome(entry, lease)
        except LostTrialError:
            self._release(entry.trial, deaths)
            self._watcher.note(f"trial {entry.trial} was left: this worker had given no sign of life for too long")
            return
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt | SystemExit | LowcalError):
                deaths += 1
            self._release(entry.trial, deaths)
            raise
        if self._ledger.finish(entry.trial, outcome):
            self._note(entry.trial, outcome)

    def _release(self, trial: int, deaths: int) -> None:
        with suppress(LowcalError):  # without the storage, the lease runs out
            self._ledger.release(trial, deaths=deaths)

    def _outcome(self, entry: Entry, lease: Lease) -> dict[str, Any]:
        """Train one trial; what is entered in the ledger for it."""
        if entry.deaths >= MOST_DEATHS:
            return _failed(f"{entry.deaths} workers in a row stopped on it")
        chosen = dict(entry.chosen)
        if entry.number is None:
            number, chosen = self._study.ask(entry.trial)
            if not self._ledger.assign(entry.trial, number, chosen):
                raise LostTrialError
        try:
            values = decode(self._plan.searches, chosen)
            recipe = apply_settings(self._plan.recipe, [], values)
            data = self._load(recipe)
            check(recipe, [self._plan.method], data, self._device)
        except LowcalError as error:  # settings that are right by themselves, but not together
            return _failed(str(error))
        text = ", ".join(f"{key}={show_value(value)}" for key, value in values.items())
        self._watcher.note(f"trial {entry.trial}: {text}")
        seeds = range(recipe.seed, recipe.seed + self._plan.seeds)
        arms = [TrialArm(self._plan.method, seed, trial=entry.trial) for seed in seeds]
        try:
            for index, arm in enumerate(arms):
                later = recipe.epochs * (len(arms) - 1 - index)
                self._train(recipe, arm, data, lease, later)
        except torch.OutOfMemoryError:
            return _failed(f"out of memory on {self._device}")
        except LowcalError as error:
            if not lease.has_begun or isinstance(error.__cause__, OSError):
                raise  # the folder's or the machine's trouble, not the settings'
            return _failed(str(error))
        return self._results(arms)

    def _train(self, recipe: Recipe, arm: TrialArm, data: Dataset, lease: Lease, later: int) -> None:
        folder = self._out / arm.folder
        lease.has_begun = False
        is_there = RunFolder.holds_run(folder)
        if is_there:
            refuse_another_recipe(folder, replace(recipe, seed=arm.seed))
            if RunFolder(folder).read_summary() is not None:
                return
        try:
            train_in_turn(recipe, [arm], self._out, data=data, device=self._device, watcher=lease, later=later)
        except LowcalError as error:
            if is_there and not lease.has_begun and not isinstance(error.__cause__, OSError):
                raise LowcalError(f"{error}; or remove {folder}, so that its trial begins anew") from None
            raise

    def _results(self, arms: Sequence[TrialArm]) -> dict[str, Any]:
        folders = [RunFolder(self._out / arm.folder) for arm in arms]
        summaries = [folder.read_summary() or {} for folder in folders]
        outcome: dict[str, Any] = {"reason": None}
        for name in MEANS:
            outcome[name] = mean(summary[name] for summary in summaries)
        for name in ("top1_error", "seconds"):
            column = [summary[name] for summary in summaries]
            outcome[f"{name}_std"] = stdev(column) if len(column) > 1 else None
        outcome["device"] = folders[0].read_environment()["device_name"]
        outcome["runs"] = [arm.folder for arm in arms]
        return outcome

    def _load(self, recipe: Recipe) -> Dataset:
        if recipe.data != self._data_of:
            self._data, self._data_of = load_data(recipe, self._data_dir), recipe.data
        return self._data

    def _note(self, trial: int, outcome: Mapping[str, Any]) -> None:
        if outcome["reason"] is not None:
            self._watcher.note(f"trial {trial} gave no result: {outcome['reason']}")
        else:
            entries = self._ledger.entries()
            done = sum(entry.outcome is not None for entry in entries)
            error = f"top-1 error {outcome['top1_error']:.2f} %"
            self._watcher.note(f"trial {trial}: {error}; {done} of {len(entries)} trials finished")
        self._tell_all()

    def _tell_all(self) -> None:
        """Let Optuna know what the ledger knows; also of a worker that died between the two."""
        entries = self._ledger.entries()
        for entry in entries:
            if entry.outcome is not None and entry.number is not None and entry.trial not in self._told:
                is_result = entry.outcome["reason"] is None
                values = [entry.outcome[name] for name in self._plan.objectives] if is_result else None
                self._study.tell(entry.number, values)
                self._told.add(entry.trial)
        if all(entry.outcome is not None for entry in entries):
            self._study.drop_others(entry.number for entry in entries if entry.number is not None)


def _failed(reason: str) -> dict[str, Any]:
    empty = dict.fromkeys((*MEANS, "top1_error_std", "seconds_std", "device"))
    return {"reason": reason, **empty, "runs": []}
