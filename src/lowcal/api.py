"""The commands `compare` and `train` as functions, whose result a notebook shows as a table and a figure.

Importing this file loads neither torch nor what the command needs.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowcal.errors import LowcalError, is_count
from lowcal.files import free_folder
from lowcal.training.process import Launch

if TYPE_CHECKING:
    import torch

    from lowcal.experiments.loggers import Logger
    from lowcal.experiments.recipe import Recipe
    from lowcal.report.runs import RunData
    from lowcal.training.distributed import TrainingGroup

Settings = Mapping[str, Any] | Iterable[str]

# The methods that are compared unless others are named.
FROM_SCRATCH = ("sgd", "local", "freeze")
FINE_TUNING = ("sgd", "freeze", "sgd-compressed")


@contextmanager
def _extra_named() -> Iterator[None]:
    """Within it the error for a missing package names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "lowcal":
            raise
        raise LowcalError(f"{missing} is not installed; pip install 'lowcal[cli]'") from error


@dataclass(frozen=True)
class Result:
    """What `compare` and `train` return; it reads the run folders when it is asked.

    ``print(result)`` shows what the command prints. A notebook shows a table and the error against the time.

    Attributes:
        text: what the command prints.
        folders: the run folders.
        report: the HTML page; None for a single run.
    """

    text: str = field(repr=False)
    folders: Sequence[Path]
    report: Path | None = None

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each method, over its seeds, with the fields of the rows in `summary.json`."""
        from lowcal.report.comparison import make_rows

        return [row.as_dict() for row in make_rows(self._runs)]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """A row for each run: `folder`, `method`, `seed`, and its results with the fields of its `summary.json`."""
        return [{"folder": run.path} | run.results | {"method": run.method, "seed": run.seed} for run in self._runs]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """A row for each epoch of each run: `method`, `seed`, and the fields of `epochs.jsonl`."""
        return [{"method": run.method, "seed": run.seed, **record} for run in self._runs for record in run.records]

    @cached_property
    def _runs(self) -> list[RunData]:
        from lowcal.report.runs import read_runs

        return read_runs(self.folders)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from lowcal.report.comparison import comparison_table, make_rows
        from lowcal.report.figures import error_against_time, picture
        from lowcal.report.headline import headline

        rows = make_rows(self._runs)
        table = comparison_table(rows, headline(rows))
        head = "".join(f"<th>{html.escape(column.heading)}</th>" for column in table.shown)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in table.cells()
        )
        image = base64.b64encode(picture(error_against_time(self._runs), "svg")).decode()
        return (
            f"<p>{html.escape(table.title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f'<img alt="top-1 error against training time" src="data:image/svg+xml;base64,{image}">'
        )


@_extra_named()
def compare(
    recipe: str | Path | Recipe = "digits",
    methods: str | Iterable[str] | None = None,
    seeds: int = 1,
    *,
    settings: Settings = (),
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: str | torch.device = "auto",
    log: str | Iterable[str] = (),
    quiet: bool = False,
) -> Result:
    """Train a network by several methods in turn, and report, as the command `lowcal compare` does.

    An interrupted comparison continues when it is called again with the same `out`.

    Args:
        recipe: a recipe's name, or the path of a recipe file.
        methods: names in a list, or in one text with commas; None: sgd, local and freeze, or for a network with given
            weights sgd, freeze and sgd-compressed.
        seeds: runs of each method, with seeds counted up.
        settings: changes of the recipe: ``{"epochs": 5}``, or as for `--set`, ``["epochs=5"]``.
        out: folder for the runs and the report; None: runs/RECIPE, or runs/RECIPE-2, ...
        data_dir: folder of the images; None: ~/.cache/lowcal.
        device: auto, cpu, cuda or cuda:N.
        log: loggers, in a list or in one text with commas: tensorboard, csv, mlflow, wandb.
        quiet: prints no progress.

    Raises:
        LowcalError: a setting, a method or a folder cannot be used, a run diverges, or a package is missing.
    """
    if Launch.read().world > 1:
        raise LowcalError("compare is for one process; start it without torchrun, which is for train")
    if not is_count(seeds):
        raise LowcalError(f"seeds={seeds!r}: must be a whole number of at least 1")
    from lowcal.console import Display, report_text
    from lowcal.experiments.loggers import find_loggers
    from lowcal.experiments.recipe_text import as_dict
    from lowcal.report.comparison import comparison_table
    from lowcal.report.headline import title

    chosen = configured(recipe, settings)
    if methods is None:
        methods = FINE_TUNING if chosen.model.weights else FROM_SCRATCH
    names = [name.strip() for name in (methods.split(",") if isinstance(methods, str) else methods)]
    folder = Path(out) if out is not None else free_folder(Path("runs") / chosen.name)
    loggers = find_loggers(log)
    with Display(quiet=quiet) as display:
        many = f"{seeds} seed{'s' * (seeds > 1)} each"
        display.note(f"{title(as_dict(chosen))}: {', '.join(names)}, {many}; in {folder}")
        from lowcal.experiments.assemble import find_device  # these take seconds, so the line above comes first
        from lowcal.experiments.compare import compare as run
        from lowcal.experiments.logged import LoggedWatcher

        with LoggedWatcher(loggers, folder, display) as watcher:
            report = run(
                chosen,
                names,
                seeds,
                folder,
                data_dir=None if data_dir is None else Path(data_dir),
                device=find_device(str(device)),
                watcher=watcher,
            )
            watcher.end(comparison_table(report.rows), report.page)
    return Result(report_text(report), report.folders, report.page)


@dataclass(frozen=True)
class Training:
    """A run that is about to start or to continue in `folder`."""

    recipe: Recipe
    method: str
    folder: Path
    group: TrainingGroup
    resume: bool
    extend: bool
    loggers: Mapping[str, type[Logger]]

    def run(self, *, data_dir: str | Path | None, quiet: bool) -> Result:
        """Train to the last epoch."""
        from lowcal.console import Display, run_text
        from lowcal.experiments.logged import LoggedWatcher
        from lowcal.experiments.recipe_text import as_dict
        from lowcal.experiments.train import train
        from lowcal.report.comparison import comparison_table, make_rows
        from lowcal.report.headline import title
        from lowcal.report.runs import read_runs

        is_main = self.group.is_main
        with (
            Display(quiet=quiet or not is_main) as display,
            LoggedWatcher(self.loggers if is_main else {}, self.folder, display) as watcher,
        ):
            among = f" by {self.group.world} processes" if self.group.world > 1 else ""
            watcher.note(f"{title(as_dict(self.recipe))}: {self.method}{among}; in {self.folder}")
            summary = train(
                self.recipe,
                self.method,
                self.folder,
                resume=self.resume,
                extend=self.extend,
                data_dir=None if data_dir is None else Path(data_dir),
                group=self.group,
                watcher=watcher,
            )
            if is_main:
                watcher.end(comparison_table(make_rows(read_runs([self.folder]))))
        return Result(run_text(summary, self.folder), [self.folder])


@_extra_named()
def train(
    recipe: str | Path | Recipe | None = None,
    method: str | None = None,
    *,
    settings: Settings = (),
    out: str | Path | None = None,
    resume: bool = False,
    extend: bool = False,
    data_dir: str | Path | None = None,
    device: str | torch.device = "auto",
    log: str | Iterable[str] = (),
    quiet: bool = False,
) -> Result:
    """Train one network by one method, as the command `lowcal train` does.

    In a script that torchrun starts, each process calls this function.

    Args:
        recipe: a recipe's name, or the path of a recipe file; None: digits, or that of the run to resume.
        method: None: local, or that of the run to resume.
        settings: as for `compare`.
        out: folder of the run; None: runs/RECIPE-METHOD, or runs/RECIPE-METHOD-2, ...
        resume: continues the run in `out`.
        extend: with `resume`, for more epochs; the setting `epochs` is the number of all epochs.
        data_dir: as for `compare`.
        device: as for `compare`; of several processes each takes its own GPU.
        log: as for `compare`; one of several processes logs.
        quiet: prints no progress.

    Raises:
        LowcalError: as `compare` does; also if the run in `out` is another one, or its checkpoints cannot be used.
    """
    with planned(
        recipe, method, settings=settings, out=out, resume=resume, extend=extend, device=device, log=log
    ) as training:
        return training.run(data_dir=data_dir, quiet=quiet)


@contextmanager
def planned(
    recipe: str | Path | Recipe | None,
    method: str | None,
    *,
    settings: Settings,
    out: str | Path | None,
    resume: bool,
    extend: bool,
    device: str | torch.device,
    log: str | Iterable[str],
) -> Iterator[Training]:
    """The run that `train` with these arguments trains; its processes are joined within the context."""
    launch, place = Launch.read(), None if out is None else Path(out)
    if extend and not resume:
        raise LowcalError("--extend goes on with a run that is there: give --resume too")
    if place is None and (resume or launch.may_restart):
        why = "--resume needs" if resume else "torchrun --max-restarts needs"
        raise LowcalError(f"{why} the run's folder: give it with --out")
    from lowcal.experiments.loggers import find_loggers
    from lowcal.experiments.recipe_text import load_recipe

    loggers = find_loggers(log)
    chosen = load_recipe("digits")
    if recipe is not None or not resume:
        chosen = configured(recipe or "digits", settings)
    from lowcal.experiments.assemble import find_device  # these take seconds, so mistakes in settings come first
    from lowcal.experiments.train import started_with
    from lowcal.methods import find_method
    from lowcal.training.distributed import joined

    with joined(find_device(str(device), launch)) as group:
        if resume and place is not None:
            kept, kept_method = started_with(place, group)
            chosen, method = (chosen if recipe is not None else configured(kept, settings)), method or kept_method
        method = method or "local"
        find_method(method)  # refuses an unknown one before anything is said of the run
        folder = place or Path(group.from_main(lambda: str(free_folder(Path("runs") / f"{chosen.name}-{method}"))))
        yield Training(chosen, method, folder, group, resume, extend, loggers)


def configured(recipe: str | Path | Recipe, settings: Settings) -> Recipe:
    """The recipe of this name or path, or this one, with the changes in `settings`."""
    from lowcal.experiments.recipe_text import apply_settings, load_recipe

    base = load_recipe(str(recipe)) if isinstance(recipe, str | Path) else recipe
    if isinstance(settings, Mapping):
        return apply_settings(base, [], settings)
    return apply_settings(base, [settings] if isinstance(settings, str) else settings)
