"""The paper's tables and figures, run and shown beside the published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowcal.experiments.arms import Watcher
from lowcal.experiments.folders import name_other_code, refuse_unwritable
from lowcal.experiments.reproduction import rivals, rows
from lowcal.experiments.reproduction.cells import Cell, choose
from lowcal.experiments.reproduction.drawing import draw
from lowcal.experiments.reproduction.estimate import epoch_seconds
from lowcal.experiments.reproduction.paper import paper
from lowcal.experiments.reproduction.plans import Plan, make_plan
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.rows import runs_of
from lowcal.experiments.reproduction.training import check_data, missing, train_missing
from lowcal.experiments.reproduction.tuning import epochs_left, search, unsearched
from lowcal.experiments.sweep import require_optuna
from lowcal.report.figures import save
from lowcal.report.runs import RunData, code_note
from lowcal.report.table import Column, Table, duration, spread_notes


@dataclass(frozen=True)
class Reproduced:
    """A table as it stands, and the files that it was written to."""

    table: Table
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Planned:
    """One training that a table needs, or one search.

    Attributes:
        cell: its id.
        state: what there is of it.
        seconds: what is left of it at the speed of a plain SGD step; None for nothing or if it was not measured.
        runs: trainings that it takes.
    """

    cell: str
    seed: int | None
    state: str
    seconds: float | None
    runs: int = 1


def reproduce(
    name: str,
    results: Results,
    *,
    seeds: int,
    cells: str | None = None,
    device: torch.device,
    watcher: Watcher,
) -> Reproduced:
    """Train what is missing of table or figure `name`, and write it to the results folder.

    Args:
        seeds: runs of each cell, with seeds counted up from the recipe's.
        cells: patterns of the cells to be trained, see `choose`; None: all.

    Raises:
        LowcalError: the name, a pattern, the folder or the data are wrong, or a run diverges.
    """
    plan = make_plan(name, results.base)
    chosen = choose(plan.cells, cells)
    results.refuse_others(plan.cells, seeds)
    refuse_unwritable(results.out)
    waiting = missing(results, chosen, seeds)
    done = len(chosen) * seeds - len(waiting)
    if done:
        watcher.note(f"{results.out}: {done} of {len(chosen) * seeds} runs are finished already")
        name_other_code([run.path for cell in chosen for run in results.complete(cell, seeds)], watcher)
    if waiting:
        check_data(results, dict.fromkeys(cell.recipe for cell, _ in waiting))
        searched = unsearched(results, [cell for cell, _ in waiting])
        if searched:
            require_optuna()
        results.begin()
        search(results, searched, device=device, watcher=watcher)
        train_missing(results, waiting, device=device, watcher=watcher)
    return write(plan, results, seeds)


def dry_run(
    name: str, results: Results, *, seeds: int, cells: str | None = None, device: torch.device
) -> tuple[Plan, list[Planned]]:
    """What `reproduce` would train, and how long it would take at most; nothing is written.

    One SGD step of each network is measured; a step with local or frozen layers takes less.
    """
    plan = make_plan(name, results.base)
    chosen = choose(plan.cells, cells)
    results.refuse_others(plan.cells, seeds)
    waiting = set(missing(results, chosen, seeds))
    speeds: dict[tuple[str, int], float] = {}

    def seconds(cell: Cell, epochs: int) -> float:
        recipe = results.recipe(cell)
        kind = (cell.recipe, recipe.batch.size)
        if kind not in speeds:
            speeds[kind] = epoch_seconds(recipe, device)
        return epochs * speeds[kind]

    entries = []
    searched = unsearched(results, [cell for cell, _ in waiting])
    for cell in chosen:
        recipe = results.recipe(cell)
        if cell in searched:
            trials, left = results.scale.trials, epochs_left(results, cell)
            words = f"search: {trials} trials of {recipe.epochs} epochs, {left} epochs left"
            entries.append(Planned(cell.id, None, words, seconds(cell, left), trials))
        for seed in range(recipe.seed, recipe.seed + seeds):
            state = results.state(cell, seed)
            if (cell, seed) not in waiting:
                entries.append(Planned(cell.id, seed, "finished", None))
                continue
            left = state.epochs - state.finished
            words = f"{state.finished} of {state.epochs} epochs done" if state.finished else f"{left} epochs"
            entries.append(Planned(cell.id, seed, words, seconds(cell, left)))
    return plan, entries


def write(plan: Plan, results: Results, seeds: int) -> Reproduced:
    """Write the table as Markdown, CSV and JSON and its pictures as SVG and PNG, from the runs that are finished."""
    table = make_table(plan, results, seeds)
    results.begin()
    stem = results.out / results.name(plan.name)
    files = table.write(stem, **_facts(plan, results, seeds, table))
    for name, figure in draw(plan, results, seeds).items():
        for kind in ("svg", "png"):
            files.append(stem.with_name(f"{stem.name}-{name}.{kind}"))
            save(figure, files[-1])
    return Reproduced(table, tuple(files))


def make_table(plan: Plan, results: Results, seeds: int) -> Table:
    """The table from the runs that are finished, with what a reader must know."""
    columns, found = _rows(plan, results, seeds)
    recipes = list(dict.fromkeys(line.recipe for line in plan.lines))
    marks = results.marks(recipes)
    title = f"{plan.title} ({marks}: not the paper's experiment)" if marks else plan.title
    runs = [run for cell in plan.cells for run in runs_of(cell, results, seeds)]
    notes = [*_origin(runs), *results.sizes(recipes), *plan.notes]
    notes += [f"{cell.id}: {settings}." for cell in plan.cells if (settings := results.found(cell))]
    if plan.kind in ("equal-accuracy", "equal-time"):
        unfinished = [cell.id for cell in plan.cells if len(results.complete(cell, seeds)) < seeds]
        notes += [f"Not finished: {', '.join(unfinished)}."] if unfinished else []
    notes += spread_notes(row.get("seeds") or 1 for row in found)
    timed = plan.kind in ("results", "equal-accuracy", "equal-time")
    if timed and (apart := rows.lines_apart(plan, results, seeds)):
        names = "; ".join(f"{line.recipe}, {line.strategy}" for line in apart)
        notes.append(f"Not trained in turn with sgd, so that a drift of the machine may show: {names}.")
    if any(row.get("paper_speedup") for row in found):
        notes.append("The paper's speed-ups are of a GTX 1080 Ti.")
    group = None if plan.kind == "equal-time" else "network"
    return Table(columns, found, title, notes=notes, group=group, drop_empty=True)


def _rows(plan: Plan, results: Results, seeds: int) -> tuple[Sequence[Column], list[dict[str, Any]]]:
    match plan.kind:
        case "results":
            return rows.RESULTS, rows.result_rows(plan, results, seeds)
        case "boundary":
            return rows.BOUNDARY, rows.boundary_rows(plan, results, seeds)
        case "memory":
            half = paper()["figure4"]["half_memory_epoch"]
            return rows.MEMORY, rows.memory_rows(plan, results, seeds, paper_half_epoch=half)
        case "equal-accuracy":
            return rivals.EQUAL_ACCURACY, rivals.equal_accuracy_rows(plan, results, seeds)
        case "equal-time":
            return rivals.EQUAL_TIME, rivals.equal_time_rows(plan, results, seeds)


def _origin(runs: Sequence[RunData]) -> list[str]:
    found = {
        f"{run.environment.get('device_name') or run.environment.get('device')}, torch {run.environment.get('torch')}"
        for run in runs
    }
    if not found:
        return ["No run is finished yet."]
    more = "; times of different machines are not compared" if len(found) > 1 else ""
    return [f"Measured on {' and '.join(sorted(found))}{more}.", *filter(None, [code_note(runs)])]


def _facts(plan: Plan, results: Results, seeds: int, table: Table) -> Mapping[str, Any]:
    runs = [run for cell in plan.cells for run in runs_of(cell, results, seeds)]
    names = ("device", "device_name", "threads", "torch", "lowcal", "code", "commit", "started")
    return {
        "table": plan.name,
        "title": table.title,
        "scale": results.scale.name,
        "settings": list(results.settings),
        "synthetic": sorted({line.recipe for line in plan.lines if results.is_synthetic(line.recipe)}),
        "seeds": seeds,
        "searched": {cell.id: asdict(found) for cell in plan.cells if (found := results.found(cell))},
        "notes": list(table.notes),
        "runs": {
            f"{run.path.parent.name}/{run.name}": {name: run.environment.get(name) for name in names} for run in runs
        },
    }


def plan_text(plan: Plan, entries: Sequence[Planned]) -> str:
    """What `--dry-run` prints."""
    lines = [plan.title, ""]
    longest = max((len(entry.cell) for entry in entries), default=0)
    for entry in entries:
        seed = "" if entry.seed is None else f"seed {entry.seed}"
        time = "" if entry.seconds is None else f"at most {duration(entry.seconds)}"
        lines.append(f"{entry.cell:<{longest}}  {seed:<7}  {entry.state}{', ' * bool(time)}{time}".rstrip())
    waiting = [entry for entry in entries if entry.seconds is not None]
    runs, time = sum(entry.runs for entry in waiting), duration(sum(entry.seconds or 0.0 for entry in waiting))
    lines += ["", f"{runs} runs, at most {time} of training" if waiting else "nothing to run"]
    if waiting:
        lines.append("from a few SGD steps of each network; without decoding, evaluation and start-up")
    return "\n".join(lines)
