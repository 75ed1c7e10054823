"""Read runs from their folders."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lowcal.errors import LowcalError, is_count
from lowcal.training.run_folder import RunFolder, code_of

COMPRESSED = "sgd-compressed"  # the rival: SGD with its whole schedule in fewer epochs, as many as follow the name
SAME_TIME = 0.95  # of a method's time, from which on a rival has been given the same
MOVING = ("local", "freeze", "refresh")  # the methods with a boundary
# Settings of how images are read, not of which images.
_READING = ("workers", "download", "on_error")
METHODS = ("sgd", "local", "freeze", "refresh", "stochastic-depth", "prune")


@dataclass(frozen=True)
class RunData:
    """One run: its identity, its epochs, and its results so far.

    `results`: top1_error (percent, last epoch), seconds, flops, peak_memory_bytes, boundary, layers, epochs.
    `images`: the counts and the source of the images; None in runs that did not record them.
    """

    path: Path
    method: str
    seed: int
    planned: int
    finished: bool
    recipe: str
    model: str
    dataset: str
    label: str | None
    records: Sequence[dict[str, Any]]
    results: dict[str, Any]
    environment: dict[str, Any]
    recipe_text: str
    images: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def is_rival(self) -> bool:
        """Whether this is SGD with its schedule compressed to the time of another method."""
        return self.method.startswith(COMPRESSED)

    @property
    def has_boundary(self) -> bool:
        """Whether the method has a boundary."""
        return self.method in MOVING or any(record["boundary"] for record in self.records)

    @property
    def moves(self) -> list[int]:
        """The epochs, counted from 0, before which the boundary moved."""
        boundaries = [record["boundary"] for record in self.records]
        return [epoch for epoch, (before, now) in enumerate(pairwise(boundaries), 1) if now > before]

    @property
    def machine(self) -> tuple[Any, ...]:
        """What must be equal for times to be compared."""
        return tuple(self.environment.get(name) for name in ("device", "device_name", "threads"))

    @property
    def code(self) -> str:
        """Identifies the version of the code that made the run."""
        return code_of(self.environment)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe as it was run, without its seed."""
        try:
            recipe = yaml.safe_load(self.recipe_text)
        except yaml.YAMLError as error:
            raise LowcalError(f"{self.path / 'recipe.yaml'} is not YAML; restore it or leave it out") from error
        if not isinstance(recipe, dict):
            raise LowcalError(f"{self.path / 'recipe.yaml'} is not a recipe; restore it or leave this run out")
        return {name: value for name, value in recipe.items() if name != "seed"}

    @property
    def subject(self) -> dict[str, Any]:
        """What must be equal for errors and times to be compared: network and images, by setting."""
        found = {f"images.{name}": value for name, value in (self.images or {}).items()}
        for section in ("model", "data"):
            values = self.settings.get(section)
            if isinstance(values, Mapping):
                found |= {f"{section}.{name}": value for name, value in values.items() if name not in _READING}
        return found

    @property
    def titled(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The arguments for `common_title`."""
        known = {"model": {"name": self.model}, "data": {"name": self.dataset}, "epochs": self.planned}
        return known | self.settings, self.images

    @property
    def test_images(self) -> int | None:
        """The number of test images; None if it is not known."""
        return self.images["test"] if self.images else self.subject.get("data.test_images")


def differing(one: RunData, other: RunData) -> list[str]:
    """Return the keys of `subject` whose values differ; a key that only one run recorded does not count."""
    left, right = one.subject, other.subject
    return [key for key in left if key in right and left[key] != right[key]]


def read_run(path: Path) -> RunData:
    """Read one run folder, finished or not; LowcalError that names the file if it cannot be shown."""
    folder = RunFolder.open(path)
    identity = folder.read_identity()
    summary = folder.read_summary()
    records = folder.read_epochs()
    log = path / "epochs.jsonl"
    if not records:
        raise LowcalError(f"{log} holds no epoch yet; wait for the run's first epoch or leave it out")
    if summary is not None and summary["epochs"] != len(records):
        raise LowcalError(
            f"{log} has {len(records)} epochs, summary.json has {summary['epochs']}; "
            "restore the log or leave this run out"
        )
    return RunData(
        path=path,
        method="-".join(filter(None, (identity["method"], identity.get("variant")))),
        seed=identity["seed"],
        planned=identity["epochs"],
        finished=summary is not None,
        recipe=identity["recipe"],
        model=identity["model"],
        dataset=identity["dataset"],
        label=identity["label"],
        records=records,
        results=summary or _results_so_far(records),
        environment=folder.read_environment(),
        recipe_text=folder.recipe,
        images=_images(identity.get("images"), path),
    )


def read_runs(paths: Iterable[Path]) -> list[RunData]:
    """Read runs that one report may show together, sorted by method and seed.

    Each path is a run or a folder of runs (a comparison's); there, runs without an epoch yet are left out.
    LowcalError if there is none, if two are the same method and seed, or if they cannot be averaged.
    """
    found = [run for path in paths for run in _expand(path)]
    if not found:
        raise LowcalError("no run was given; give at least one run folder")
    unique = {run.path.resolve(): run for run in found}
    runs = sorted(unique.values(), key=lambda run: (*method_order(run.method), run.seed))
    for field in ("model", "dataset"):
        values = {getattr(run, field): run for run in runs}
        if len(values) > 1:
            (one, first), (other, second), *_ = values.items()
            raise LowcalError(f"{first.path} has {field} {one!r}, {second.path} has {other!r}; report them apart")
    for group in by_method(runs).values():
        _refuse_unless_seeds_of_one(group)
    return runs


def by_method(runs: Iterable[RunData]) -> dict[str, list[RunData]]:
    """Group runs by method, in the order in which they come."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def code_note(runs: Iterable[RunData]) -> str | None:
    """Return a sentence on which code made which of `runs`; None if the code is the same for all."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(run.code, []).append(run.name)
    if len(groups) < 2:
        return None
    made = [
        f"{code} ({', '.join(names) if len(names) < 4 else f'{len(names)} runs'})" for code, names in groups.items()
    ]
    return f"The runs were made by different code: {', '.join(made)}."


def method_order(method: str) -> tuple[int, str]:
    """Sort key: the baseline first, then the known methods, then others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def _expand(path: Path) -> list[RunData]:
    if RunFolder.holds_run(path):
        return [read_run(path)]
    if not path.is_dir():
        raise LowcalError(f"{path} is not a folder; give the folder of a run or of a comparison")
    folders = sorted(entry for entry in path.iterdir() if RunFolder.holds_run(entry))
    started = [folder for folder in folders if RunFolder(folder).read_epochs()]
    if folders and not started:
        raise LowcalError(f"{folders[0] / 'epochs.jsonl'} holds no epoch yet; wait for the first one")
    if not started:
        raise LowcalError(f"{path} is not a run folder and holds none; give the folder of a run")
    return [read_run(folder) for folder in started]


def _refuse_unless_seeds_of_one(group: Sequence[RunData]) -> None:
    first = group[0]
    for run, other in zip(group[1:], group, strict=False):
        if run.seed == other.seed:
            raise LowcalError(
                f"{other.path} and {run.path} are both {run.method} with seed {run.seed}; report them apart"
            )
        if (run.planned, _unlabelled(run)) != (first.planned, _unlabelled(first)):
            raise LowcalError(
                f"{first.path} and {run.path} are both {run.method} but differ in their recipes, "
                "so that no mean can be taken; report them apart"
            )


def _unlabelled(run: RunData) -> dict[str, Any]:
    """Return the settings without the label, whose wording differs between versions."""
    return {name: value for name, value in run.settings.items() if name != "label"}


def _images(value: Any, path: Path) -> dict[str, Any] | None:
    """Return the counts of images that a run recorded; LowcalError if they are damaged."""
    if value is None:
        return None
    counts = ("train", "train_of", "test", "test_of", "classes")
    if not isinstance(value, dict) or not all(is_count(value.get(name)) for name in counts):
        raise LowcalError(f"{path / 'environment.json'} has damaged 'images'; restore it or leave this run out")
    return value


def _results_so_far(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = records[-1]
    return {
        "top1_error": last["top1_error"],
        "seconds": last["total_seconds"],
        "flops": sum(record["flops"] for record in records),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "boundary": last["boundary"],
        "layers": last["layers"],
        "epochs": len(records),
    }
