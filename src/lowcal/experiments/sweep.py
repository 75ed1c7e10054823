"""A sweep: many trials of a method, each under settings that Optuna chooses."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowcal.data import Dataset
from lowcal.errors import LowcalError, nearest
from lowcal.experiments.arms import Watcher
from lowcal.experiments.assemble import check, images_of, load_data
from lowcal.experiments.compare import note_skipped
from lowcal.experiments.folders import refuse_used
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import as_dict, differences, dump_recipe, parse_recipe, show_value
from lowcal.experiments.search_space import base_recipe, grid, own_point, parse_search, refuse_unused, variants
from lowcal.methods import find_method
from lowcal.report.headline import title
from lowcal.report.sweep import SweepReport, write_sweep
from lowcal.training.run_folder import RunFolder
from lowcal.user_files import digests

OBJECTIVES = ("top1_error", "best_top1_error", "seconds", "flops")
SAMPLERS = ("tpe", "random", "grid")
SHORTEST_LEASE = 2  # seconds; databases store heartbeats in whole seconds, and one is recorded each second


class Sweep:
    """What a sweep does. Trials are evaluated on held-out training images unless `settings` say otherwise.

    With the sampler "tpe", the first trial has the recipe's own settings (`start`) if they are among those searched.

    Args:
        recipe: of every trial; the attribute has the searched settings at the first points of their searches.
        method: that trains.
        searches: the settings that differ between trials, each as `parse_search` takes it.
        settings: `key=value`, for all trials.
        trials: their number, over all workers; may be None for a grid, which has one for each combination.
        seeds: runs of a trial; their mean counts.
        objective: what is minimised: one of `OBJECTIVES`, or several separated by commas.
        sampler: how settings are chosen: Optuna's "tpe" or "random", or "grid", every combination once.
        study: the sweep's name in its database; None: the recipe's name and the method's.
        storage: the database's URL; None: a file in the sweep's folder.
        lease: seconds without a heartbeat after which a worker counts as dead.

    Raises:
        LowcalError: one of them is wrong; the message says which and what to give.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: str,
        searches: Sequence[str],
        *,
        settings: Sequence[str] = (),
        trials: int | None = None,
        seeds: int = 1,
        objective: str = "top1_error",
        sampler: str = "tpe",
        study: str | None = None,
        storage: str | None = None,
        lease: float = 60.0,
    ) -> None:
        find_method(method)
        if not searches:
            raise LowcalError("there is nothing to search; give --search key=low:high or key=value,value,...")
        self.searches = tuple(parse_search(text) for text in searches)
        refuse_unused(self.searches, method)
        self.recipe = base_recipe(recipe, ["data.evaluate=validation", *settings], self.searches)
        self.objectives = objective.split(",")
        if sampler not in SAMPLERS:
            raise LowcalError(f"unknown sampler '{sampler}'{nearest(sampler, SAMPLERS)}")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise LowcalError(f"unknown objective '{name}'{nearest(name, OBJECTIVES)}")
            if self.objectives.count(name) > 1:
                raise LowcalError(f"--objective {objective}: '{name}' is there twice; name each once")
        if sampler == "grid":
            combinations = len(grid(self.searches))
            if trials not in (None, combinations):
                raise LowcalError(f"--trials {trials}: this grid has {combinations} combinations; leave --trials out")
            trials = combinations
        if trials is None:
            raise LowcalError(
                "the number of trials is missing; give --trials N, or --sampler grid for all combinations"
            )
        for option, value, least in (("trials", trials, 1), ("seeds", seeds, 1), ("lease", lease, SHORTEST_LEASE)):
            if value < least:
                raise LowcalError(f"--{option} {value:g}: must be at least {least}; give more")
        self.method, self.trials, self.seeds, self.sampler = method, trials, seeds, sampler
        self.study, self.storage, self.lease = study or f"{recipe.name}-{method}", storage, lease
        self.start = own_point(recipe, self.searches) if sampler == "tpe" else None

    def definition(self) -> dict[str, Any]:
        """What all workers on a sweep must agree on."""
        return {
            "method": self.method,
            "search": [str(search) for search in self.searches],
            "objective": ",".join(self.objectives),
            "sampler": self.sampler,
            "start": [f"{key}={show_value(value)}" for key, value in (self.start or {}).items()],
            "seeds": self.seeds,
            "recipe": dump_recipe(self.recipe),
            "files": [f"{name} ({found})" for name, found in digests(*self._names()).items()],
        }

    def _names(self) -> list[str]:
        """The networks and the data that it uses."""
        searched = [str(v) for one in self.searches if one.key in ("model.name", "data.name") for v in one.points]
        return [self.recipe.model.name, self.recipe.data.name, *searched]


def sweep(plan: Sweep, out: Path, *, data_dir: Path | None, device: torch.device, watcher: Watcher) -> SweepReport:
    """Work on a sweep until all its trials are finished, then write the report to `out`.

    Any number of processes may do the same at once, on as many machines as reach the storage. Another worker continues
    the trial of one that dies, from its checkpoint where the folder is the same. Call this again to continue an
    interrupted sweep, or to add trials to a finished one.

    Raises:
        LowcalError: the plan does not fit the network or the data, `out` holds something else, or the storage cannot
            be used or holds another sweep of this name. Nothing is written unless all fits.
    """
    require_optuna()
    from lowcal.experiments.sweep_storage import open_study, storage_url
    from lowcal.experiments.sweep_worker import Worker

    url = storage_url(plan.storage) if plan.storage else None
    _refuse_other_folder(out)
    data = load_data(plan.recipe, data_dir, watcher=watcher)
    note_skipped(data, watcher)
    check(plan.recipe, [plan.method], data, device)
    for setting, other in variants(plan.recipe, plan.searches):
        if other.data == plan.recipe.data:
            try:
                check(other, [plan.method], data, device)
            except LowcalError as error:
                raise LowcalError(f"with {setting}: {error}") from None
    _make_folder(out)
    url = url or storage_url("sqlite:///sweep.db").set(database=str(out.absolute() / "sweep.db"))
    with open_study(url, plan.study, objectives=len(plan.objectives), lease=plan.lease) as study:
        _refuse_other_sweep(study.user_attrs.get("definition"), plan, is_new=not study.trials)
        study.set_user_attr("definition", plan.definition())
        worker = Worker(plan, out, study, data, plan.recipe.data, data_dir, device, watcher)
        known = len(worker.attempts())
        if known > plan.trials:
            raise LowcalError(
                f"--trials {plan.trials}: the sweep '{plan.study}' has {known} already; give at least that"
            )
        worker.work()
        return write_sweep(worker.rows(), {**_heading(plan, data), "best": worker.best()}, out)


def require_optuna() -> None:
    """Refuse to begin without Optuna."""
    if importlib.util.find_spec("optuna") is None:
        raise LowcalError("a sweep needs Optuna, which is not installed; pip install 'lowcal[sweep]'")


def _heading(plan: Sweep, data: Dataset) -> dict[str, Any]:
    recipe = plan.recipe
    return {
        "study": plan.study,
        "recipe": recipe.name,
        "label": recipe.label,
        "title": title(as_dict(recipe), images_of(data)),
        "method": plan.method,
        "model": recipe.model.name,
        "dataset": data.name,
        "evaluate": recipe.data.evaluate,
        "objectives": plan.objectives,
        "sampler": plan.sampler,
        "seeds": plan.seeds,
        "search": [str(search) for search in plan.searches],
        "logarithmic": [search.key for search in plan.searches if search.kind == "log"],
    }


def _refuse_other_sweep(definition: dict[str, Any] | None, plan: Sweep, *, is_new: bool) -> None:
    """Refuse a study that is not of this sweep."""
    where = f"the storage holds another sweep '{plan.study}'"
    remedy = "continue that one, or choose another --study or --out"
    if definition is None:
        if is_new:
            return
        raise LowcalError(f"{where}, of an earlier version or another program; choose another --study or --out")
    for name, new in plan.definition().items():
        old = definition.get(name, [])  # earlier versions had no files
        if name != "recipe" and old != new:
            old, new = (" ".join(value) if isinstance(value, list) else value for value in (old, new))
            raise LowcalError(f"{where}: its {name} is {old}, not {new}; {remedy}")
    changed = differences(parse_recipe(definition["recipe"], f"of the sweep '{plan.study}'"), plan.recipe)
    if changed:
        raise LowcalError(f"{where} of another recipe: {changed[0]}; {remedy}")


def _refuse_other_folder(out: Path) -> None:
    """Refuse a folder that holds something other than a sweep."""
    if RunFolder.holds_run(out):
        raise LowcalError(f"{out} is a single run, not a sweep; choose another --out")
    ours = re.compile(r"trial-\d+-seed\d+|sweep\.db")
    if not (out.is_dir() and any(ours.fullmatch(entry.name) for entry in out.iterdir())):
        refuse_used(out, "a sweep")


def _make_folder(out: Path) -> None:
    """Make the folder, which other workers may be making too, and try whether it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise LowcalError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
