"""Optuna's part in a sweep: it chooses the settings of each trial, from those that are finished."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from lowcal.errors import LowcalError
from lowcal.experiments.ledger import connect_args, reachable
from lowcal.experiments.search import Search, Values, grid, label

TRIES = 6  # several workers that begin at once make the tables at once


class Study:
    """A study in the sweep's database; every objective is minimised.

    Args:
        url: the database.
        name: of the study.
        objectives: their number.
        searches: the settings to choose.
        sampler: "tpe", "random" or "grid".
        seed: of the choices.
        start: the settings of the first trial; None: chosen as all others.
    """

    def __init__(
        self,
        url: URL,
        name: str,
        *,
        objectives: int,
        searches: Sequence[Search],
        sampler: str,
        seed: int,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._url, self._name, self._objectives = url, name, objectives
        self._searches, self._sampler, self._seed, self._start = searches, sampler, seed, start
        with reachable(url):
            self._study = self._open()

    def ask(self, trial: int) -> tuple[int, dict[str, Any]]:
        """The settings of the sweep's trial number `trial`: Optuna's number of it, and what was chosen by key.

        The choice hangs on the seed, on `trial` and on the trials that are finished, not on the worker.
        """
        distributions = {search.key: _distribution(search) for search in self._searches}
        with reachable(self._url):
            self._study.sampler = self._make_sampler(trial)
            asked = self._study.ask(distributions)
            return asked.number, dict(asked.params)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Enter a trial's objectives, None if it came to none; does nothing if that was done before."""
        state = TrialState.COMPLETE if values is not None else TrialState.PRUNED
        with reachable(self._url), suppress(UpdateFinishedTrialError):  # another worker may be doing the same
            self._study.tell(number, values, state, skip_if_finished=True)

    def drop_others(self, numbers: Iterable[int]) -> None:
        """Mark as failed what was begun and is not among `numbers`: its worker died before it could say so."""
        known = set(numbers)
        with reachable(self._url):
            for begun in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if begun.number not in known:
                    with suppress(UpdateFinishedTrialError):
                        self._study.tell(begun.number, state=TrialState.FAIL, skip_if_finished=True)

    def close(self) -> None:
        """Give the connections back."""
        self._storage.engine.dispose()

    def _open(self) -> optuna.Study:
        # Optuna fills in braces as a template's; the driver of SQLite must wait for other writers.
        text = self._url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        for left in range(TRIES - 1, -1, -1):
            try:
                options = {"connect_args": connect_args(self._url)}
                self._storage = optuna.storages.RDBStorage(text, engine_kwargs=options)
                return optuna.create_study(
                    storage=self._storage,
                    study_name=self._name,
                    directions=["minimize"] * self._objectives,
                    load_if_exists=True,
                )
            except RuntimeError as error:  # tables of another Optuna
                reason = str(error).partition("\n")[0]
                raise LowcalError(f"the sweep's storage is of another version of Optuna: {reason}") from None
            except (SQLAlchemyError, StorageInternalError):
                if not left:
                    raise
                time.sleep(0.2 + 0.3 * random.random())
        raise AssertionError("the loop ends in a return or an error")

    def _make_sampler(self, trial: int) -> BaseSampler:
        seed = random.Random(f"{self._seed}/{trial}").getrandbits(32)
        if self._sampler == "grid":
            return _Given({key: label(value) for key, value in grid(self._searches)[trial].items()})
        if trial == 0 and self._start is not None:
            return _Given({key: label(value) for key, value in self._start.items()})
        if self._sampler == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(seed=seed, constant_liar=True)  # which keeps workers from trying the same at once


class _Given(BaseSampler):
    """Chooses what it was given."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._values[param_name]


def _distribution(search: Search) -> BaseDistribution:
    if isinstance(search, Values):
        return CategoricalDistribution([label(value) for value in search.values])
    if search.whole:
        return IntDistribution(int(search.low), int(search.high), log=search.log)
    return FloatDistribution(search.low, search.high, log=search.log)
