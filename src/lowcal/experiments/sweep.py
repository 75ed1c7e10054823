"""Settings searched by many trials, on one machine or on many: a method's runs under settings that Optuna chooses."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowcal.data import Dataset
from lowcal.errors import LowcalError, nearest
from lowcal.experiments.arms import Watcher
from lowcal.experiments.assemble import check, images_of, load_data
from lowcal.experiments.compare import note_skipped
from lowcal.experiments.folders import refuse_used
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import as_dict, differences, dump_recipe, parse_recipe, show_value
from lowcal.experiments.search import Search, base_recipe, grid, own_point, parse_search, refuse_unused, variants
from lowcal.methods import find_method
from lowcal.report.headline import title
from lowcal.report.sweep import SweepReport, write_sweep
from lowcal.training.run_folder import RunFolder

if TYPE_CHECKING:
    from lowcal.experiments.ledger import Ledger

OBJECTIVES = ("top1_error", "best_top1_error", "seconds", "flops")
SAMPLERS = ("tpe", "random", "grid")
LEASE = 60.0  # seconds


@dataclass(frozen=True)
class Sweep:
    """What a sweep does.

    Attributes:
        recipe: of every trial, the searched settings at the first point of their searches.
        method: that trains.
        searches: the settings that differ between trials.
        trials: their number, over all workers.
        seeds: runs of a trial, whose mean counts.
        objectives: what is minimised: names of a run's results; with several, the trials that no other beats in all.
        sampler: how settings are chosen: Optuna's "tpe" or "random", or every combination once, "grid".
        study: the sweep's name in its database.
        storage: the database's URL; None: a file in the sweep's folder.
        lease: seconds without a sign of life after which a worker counts as dead.
        start: the settings of the first trial; None: chosen as all others.
    """

    recipe: Recipe
    method: str
    searches: tuple[Search, ...]
    trials: int
    seeds: int = 1
    objectives: tuple[str, ...] = ("top1_error",)
    sampler: str = "tpe"
    study: str = "sweep"
    storage: str | None = None
    lease: float = LEASE
    start: Mapping[str, Any] | None = None

    def definition(self) -> str:
        """What all workers on a sweep must agree in, as text."""
        same = {
            "method": self.method,
            "search": [str(search) for search in self.searches],
            "objective": ",".join(self.objectives),
            "sampler": self.sampler,
            "start": [f"{key}={show_value(value)}" for key, value in (self.start or {}).items()],
            "seeds": self.seeds,
            "recipe": dump_recipe(self.recipe),
        }
        return json.dumps(same)


def plan_sweep(
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
    lease: float = LEASE,
) -> Sweep:
    """The sweep that the command's options describe, evaluated on held-out training images unless `settings` say else.

    Its first trial has the recipe's own settings, if the sampler is "tpe" and they are among those searched.

    Args:
        searches: each as `parse_search` takes it.
        settings: `key=value`, for all trials.
        trials: may be left out for a grid, which has as many as there are combinations.
        objective: one of `OBJECTIVES`, or several separated by commas.
        study: by default the recipe's name and the method's.

    Raises:
        LowcalError: one of them is wrong; the message says which and what to give.
    """
    find_method(method)
    if not searches:
        raise LowcalError("there is nothing to search; give --search key=low:high or key=value,value,...")
    found = tuple(parse_search(text) for text in searches)
    refuse_unused(found, method)
    base = base_recipe(recipe, ["data.evaluate=validation", *settings], found)
    for name, known in ((sampler, SAMPLERS), *((name, OBJECTIVES) for name in objective.split(","))):
        if name not in known:
            what = "sampler" if known is SAMPLERS else "objective"
            raise LowcalError(f"unknown {what} '{name}'{nearest(name, known)}")
    if len(set(objective.split(","))) < len(objective.split(",")):
        raise LowcalError(f"--objective {objective}: one is there twice; name each once")
    if sampler == "grid":
        combinations = len(grid(found))
        if trials not in (None, combinations):
            raise LowcalError(f"--trials {trials}: this grid has {combinations} combinations; leave --trials out")
        trials = combinations
    if trials is None:
        raise LowcalError("the number of trials is missing; give --trials N, or --sampler grid for all combinations")
    for option, value, least in (("trials", trials, 1), ("seeds", seeds, 1), ("lease", lease, 1)):
        if value < least:
            raise LowcalError(f"--{option} {value:g}: must be at least {least}; give more")
    name = study or f"{recipe.name}-{method}"
    objectives = tuple(objective.split(","))
    start = own_point(recipe, found) if sampler == "tpe" else None
    return Sweep(base, method, found, trials, seeds, objectives, sampler, name, storage, lease, start)


def sweep(plan: Sweep, out: Path, *, data_dir: Path | None, device: torch.device, watcher: Watcher) -> SweepReport:
    """Work on a sweep until all its trials are finished, then write the report to `out`.

    Any number of processes may do the same at once, on as many machines as reach the storage. The trial of one that
    dies is taken up again by another, from its checkpoint where the folder is the same. To go on with a sweep that was
    interrupted, or with more trials, call this again.

    Raises:
        LowcalError: the plan does not fit the network or the data, `out` holds something else, or the storage cannot
            be used or holds another sweep of this name. Nothing is written unless all fits.
    """
    require_optuna()
    from lowcal.experiments.ledger import Ledger, storage_url
    from lowcal.experiments.sampling import Study
    from lowcal.experiments.worker import Worker

    url = storage_url(plan.storage) if plan.storage else None
    _refuse_strange(out)
    data = load_data(plan.recipe, data_dir)
    note_skipped(data, watcher)
    check(plan.recipe, [plan.method], data, device)
    for setting, other in variants(plan.recipe, plan.searches):
        if other.data == plan.recipe.data:
            try:
                check(other, [plan.method], data, device)
            except LowcalError as error:
                raise LowcalError(f"with {setting}: {error}") from None
    _make(out)
    if url is None:
        url = storage_url("sqlite:///sweep.db").set(database=str(out.absolute() / "sweep.db"))
    with closing(Ledger(url, plan.study, plan.lease)) as ledger:
        _join(ledger, plan)
        choices = Study(
            url,
            plan.study,
            objectives=len(plan.objectives),
            searches=plan.searches,
            sampler=plan.sampler,
            seed=plan.recipe.seed,
            start=plan.start,
        )
        with closing(choices) as study:
            worker = Worker(plan, out, ledger, study, data=data, data_dir=data_dir, device=device, watcher=watcher)
            worker.work()
            return write_sweep(worker.rows(), _heading(plan, data), out)


def require_optuna() -> None:
    """Refuse to begin without Optuna."""
    if importlib.util.find_spec("optuna") is None:
        raise LowcalError("a sweep needs Optuna, which is not here; pip install 'lowcal[sweep]'")


def _join(ledger: Ledger, plan: Sweep) -> None:
    """Enter the sweep in the ledger, or find it there."""
    definition = plan.definition()
    there = ledger.join(definition)
    if there != definition:
        _refuse_another(json.loads(there), plan)
    ledger.grow(plan.trials)
    known = len(ledger.entries())
    if known > plan.trials:
        raise LowcalError(f"--trials {plan.trials}: the sweep '{plan.study}' has {known} already; give as many or more")


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
        "objectives": list(plan.objectives),
        "sampler": plan.sampler,
        "seeds": plan.seeds,
        "search": [str(search) for search in plan.searches],
        "logarithmic": [search.key for search in plan.searches if getattr(search, "log", False)],
    }


def _refuse_another(there: dict[str, Any], plan: Sweep) -> None:
    """Refuse a sweep of the same name that is not `plan`."""
    own = json.loads(plan.definition())
    where = f"the storage holds another sweep '{plan.study}'"
    remedy = "go on with that one, or choose another --study or --out"
    for name, value in own.items():
        if name != "recipe" and there.get(name) != value:
            old, new = (" ".join(v) if isinstance(v, list) else v for v in (there.get(name), value))
            raise LowcalError(f"{where}: its {name} is {old}, not {new}; {remedy}")
    changed = differences(parse_recipe(there["recipe"], f"of the sweep '{plan.study}'"), plan.recipe)
    if changed:
        raise LowcalError(f"{where} of another recipe: {changed[0]}; {remedy}")


def _refuse_strange(out: Path) -> None:
    """Refuse a folder with something other than a sweep in it."""
    if RunFolder.holds_run(out):
        raise LowcalError(f"{out} is a single run, not a sweep; choose another --out")
    ours = re.compile(r"trial-\d+-seed\d+|sweep\.db")
    if not (out.is_dir() and any(ours.fullmatch(entry.name) for entry in out.iterdir())):
        refuse_used(out, "a sweep")


def _make(out: Path) -> None:
    """Make the folder, which other workers may be making too, and try whether it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise LowcalError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
