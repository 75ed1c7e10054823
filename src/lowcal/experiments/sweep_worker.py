"""A worker of a sweep: takes trials from an Optuna study, trains them and stores their results there.

The study is the queue: every trial of the sweep waits in it from the start, and Optuna gives each to one worker. A
trial of Optuna is one attempt at a trial of the sweep, whose number is its user attribute `trial`. Optuna records a
heartbeat while a worker trains. An attempt becomes FAIL when its heartbeat or its worker stops; the next worker that
looks queues another attempt with the same settings.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from lowcal.data import Dataset
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm, Watcher
from lowcal.experiments.assemble import check, load_data
from lowcal.experiments.compare import train_in_turn
from lowcal.experiments.folders import refuse_another_recipe
from lowcal.experiments.recipe import DataSettings, Recipe
from lowcal.experiments.recipe_text import apply_settings, show_value
from lowcal.experiments.search_space import grid, label
from lowcal.experiments.sweep_storage import STORAGE_ERRORS
from lowcal.training.run_folder import RunFolder

if TYPE_CHECKING:
    from lowcal.experiments.sweep import Sweep
    from lowcal.training.epoch import Progress

MEANS = ("top1_error", "best_top1_error", "seconds", "flops", "boundary", "layers")
MOST_DEATHS = 3  # workers in a row that may die on a trial without finishing an epoch


@dataclass(frozen=True)
class TrialArm(Arm):
    """One run of a trial."""

    trial: int = 0

    @property
    def folder(self) -> str:
        """The name of its run folder within the sweep's."""
        return f"trial-{self.trial:04}-seed{self.seed}"


@dataclass
class Worker:
    """Trains trials of a sweep. It is the watcher of its runs, and passes on what happens.

    Attributes:
        plan: the sweep.
        out: its folder.
        study: its study.
        data: the images under `data_of`, at first the plan's own.
        data_dir: where other images are.
        device: to train on.
        watcher: is told what happens.
    """

    plan: Sweep
    out: Path
    study: optuna.Study
    data: Dataset
    data_of: DataSettings
    data_dir: Path | None
    device: torch.device
    watcher: Watcher
    _error: BaseException | None = None
    _trial: optuna.Trial = field(init=False)  # the present one
    _deaths: int = 0
    _held: float = 0.0  # when the trial was last known to be this worker's
    _has_begun: bool = False

    def work(self) -> None:
        """Train trials until all are finished, including those that other workers have now."""
        is_waiting = False
        while True:
            fail_stale_trials(self.study)
            attempts = self.attempts()
            unfinished = {n: tries for n, tries in attempts.items() if not any(_is_finished(one) for one in tries)}
            to_queue = [n for n, tries in unfinished.items() if all(one.state == TrialState.FAIL for one in tries)]
            for number in to_queue:
                self._queue(number, attempts[number])
            if to_queue or any(one.state == TrialState.WAITING for tries in attempts.values() for one in tries):
                is_waiting = False
                self._train_next()
            elif left := len(unfinished):
                if not is_waiting:
                    self.watcher.note(f"waiting for {left} trial{'s' * (left > 1)} of other workers")
                is_waiting = True
                time.sleep(min(2.0, self.plan.lease / 4))
            else:
                return

    def attempts(self) -> dict[int, list[FrozenTrial]]:
        """The attempts at each trial of the sweep, in order."""
        found: dict[int, list[FrozenTrial]] = {number: [] for number in range(self.plan.trials)}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.user_attrs.get("trial") is not None:
                found.setdefault(trial.user_attrs["trial"], []).append(trial)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The settings and results of the finished trials, in the order of their numbers."""
        keys = [search.key for search in self.plan.searches]
        return [
            {
                "trial": number,
                "settings": {key: one.params[key] for key in keys if key in one.params},
                **one.user_attrs["results"],
            }
            for number, tries in sorted(self.attempts().items())
            for one in tries
            if _is_finished(one)
        ]

    def best(self) -> list[int]:
        """The numbers of the trials that no other beats: lower in one objective and no higher in the others."""
        return sorted(trial.user_attrs["trial"] for trial in self.study.best_trials)

    def _queue(self, number: int, earlier: Sequence[FrozenTrial]) -> None:
        """Queue an attempt at a trial, with the settings of earlier attempts if there are any."""
        point: Mapping[str, Any] = earlier[-1].params if earlier else {}
        if self.plan.sampler == "grid":
            point = grid(self.plan.searches)[number]
        elif number == 0 and self.plan.start is not None:
            point = self.plan.start
        attributes = earlier[-1].user_attrs if earlier else {"trial": number}
        self.study.enqueue_trial({key: label(value) for key, value in point.items()}, user_attrs=attributes)

    def _train_next(self) -> None:
        """Train the trial that is next in the queue."""
        self._error = None
        # Optuna raises one of these if the attempt became FAIL meanwhile. Errors of the training are in self._error.
        with suppress(ValueError, AssertionError, UpdateFinishedTrialError):
            self.study.optimize(self._attempt, n_trials=1)
        if self._error is not None:
            raise self._error

    def _attempt(self, trial: optuna.Trial) -> list[float]:
        """Train a trial; returns its objectives, or none if it is not finished, which makes the attempt FAIL."""
        number: int = trial.user_attrs.get("trial", -1)
        self.study.sampler = self._sampler(number)
        values = {search.key: search.suggest(trial) for search in self.plan.searches}
        earlier = [one for one in self.attempts().get(number, []) if one.number < trial.number]
        is_double = any(one.state != TrialState.FAIL or one.params.items() - trial.params.items() for one in earlier)
        if number < 0 or is_double:  # workers asked for the last trial, or queued a trial, at the same time
            trial.set_user_attr("trial", None)
            return []
        if earlier:
            self.watcher.note(f"trial {number} is taken up again: its worker stopped")
        self._trial, self._held, deaths = trial, time.monotonic(), trial.user_attrs.get("deaths", 0)
        try:
            self._hold(deaths + 1)
            if deaths < MOST_DEATHS:
                results = self._results(number, values)
            else:
                results = _no_result(f"{deaths} workers in a row stopped on it")
            trial.set_user_attr("results", results)
        except UpdateFinishedTrialError:
            self.watcher.note(f"trial {number} was left: this worker gave no sign of life for too long")
            return []
        except BaseException as error:
            self._error = error
            if isinstance(error, KeyboardInterrupt | SystemExit | LowcalError):  # not the trial's fault
                with suppress(UpdateFinishedTrialError):
                    self._hold(min(deaths, self._deaths))
            return []
        if results["reason"] is not None:
            self.watcher.note(f"trial {number} gave no result: {results['reason']}")
            raise optuna.TrialPruned
        finished = f"{len(self.rows()) + 1} of {len(self.attempts())} trials finished"
        self.watcher.note(f"trial {number}: top-1 error {results['top1_error']:.2f} %; {finished}")
        return [results[name] for name in self.plan.objectives]

    def _hold(self, deaths: int) -> None:
        """Store how many workers in a row began the present trial and finished no epoch.

        Raises:
            UpdateFinishedTrialError: another worker found the heartbeat stale and has the trial now.
            SQLAlchemyError, StorageInternalError: the storage has not answered for as long as the lease.
        """
        self._deaths = deaths
        try:
            self._trial.set_user_attr("deaths", deaths)
        except STORAGE_ERRORS:
            if time.monotonic() - self._held > self.plan.lease:
                raise
        else:
            self._held = time.monotonic()

    def _results(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Train all runs of a trial; what is stored for it."""
        try:
            recipe = apply_settings(self.plan.recipe, [], values)
            data = self._load(recipe)
            check(recipe, [self.plan.method], data, self.device)
        except LowcalError as error:  # settings that are right by themselves, but not together
            return _no_result(str(error))
        text = ", ".join(f"{key}={show_value(value)}" for key, value in values.items())
        self.watcher.note(f"trial {number}: {text}")
        seeds = range(recipe.seed, recipe.seed + self.plan.seeds)
        arms = [TrialArm(self.plan.method, seed, trial=number) for seed in seeds]
        try:
            for later, arm in zip(reversed(range(len(arms))), arms, strict=True):
                self._train(recipe, arm, data, later * recipe.epochs)
        except torch.OutOfMemoryError:
            return _no_result(f"out of memory on {self.device}")
        except LowcalError as error:
            if not self._has_begun or isinstance(error.__cause__, OSError):
                raise  # the folder or the machine is at fault, not the settings
            return _no_result(str(error))
        folders = [RunFolder(self.out / arm.folder) for arm in arms]
        summaries = [folder.read_summary() or {} for folder in folders]
        results: dict[str, Any] = {"reason": None}
        results |= {name: mean(summary[name] for summary in summaries) for name in MEANS}
        for name in ("top1_error", "seconds"):
            column = [summary[name] for summary in summaries]
            results[f"{name}_std"] = stdev(column) if len(column) > 1 else None
        results["device"] = folders[0].read_environment()["device_name"]
        return results | {"runs": [arm.folder for arm in arms]}

    def _sampler(self, number: int) -> BaseSampler:
        """The sampler of a trial, with a seed of its own, so that its choice does not depend on the worker."""
        seed = random.Random(f"{self.plan.recipe.seed}/{number}").getrandbits(32)
        if self.plan.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, constant_liar=True)  # which keeps workers from trying the same at once

    def _load(self, recipe: Recipe) -> Dataset:
        if recipe.data != self.data_of:
            self.data, self.data_of = load_data(recipe, self.data_dir, watcher=self), recipe.data
        return self.data

    def _train(self, recipe: Recipe, arm: TrialArm, data: Dataset, later: int) -> None:
        folder = self.out / arm.folder
        self._has_begun = False
        is_there = RunFolder.holds_run(folder)
        if is_there:
            refuse_another_recipe(folder, replace(recipe, seed=arm.seed))
            if RunFolder(folder).read_summary() is not None:
                return
        try:
            train_in_turn(recipe, [arm], self.out, data=data, device=self.device, watcher=self, later=later)
        except LowcalError as error:
            if is_there and not self._has_begun and not isinstance(error.__cause__, OSError):
                raise LowcalError(f"{error}; or remove {folder}, so that its trial starts again") from None
            raise

    def note(self, text: str) -> None:
        """As `Watcher`."""
        self.watcher.note(text)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """As `Watcher`."""
        self.watcher.stage(text, done, total)

    def begin(self, arms: Sequence[Arm], finished: Sequence[int], epochs: int, *, later: int = 0) -> None:
        """As `Watcher`."""
        self._has_begun = True
        self.watcher.begin(arms, finished, epochs, later=later)

    def step(self, arm: Arm, progress: Progress) -> None:
        """As `Watcher`; ends the training if another worker has the trial."""
        if time.monotonic() - self._held > self.plan.lease / 6:
            self._hold(self._deaths)
        self.watcher.step(arm, progress)

    def epoch(self, arm: Arm, record: Mapping[str, Any]) -> None:
        """As `Watcher`; ends the training if another worker has the trial."""
        self.watcher.epoch(arm, record)
        self._hold(0)


def _is_finished(attempt: FrozenTrial) -> bool:
    return attempt.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _no_result(reason: str) -> dict[str, Any]:
    empty = dict.fromkeys((*MEANS, "top1_error_std", "seconds_std", "device"))
    return {"reason": reason, **empty, "runs": []}
