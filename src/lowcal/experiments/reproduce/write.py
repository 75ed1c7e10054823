"""A table's files: Markdown, CSV and JSON, and its pictures as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lowcal.experiments.reproduce import rivals, rows
from lowcal.experiments.reproduce.paper import PaperTable, table_names
from lowcal.experiments.reproduce.results import Results
from lowcal.experiments.reproduce.rivals import compressed_line, curves
from lowcal.experiments.reproduce.rows import Measured
from lowcal.report import figures
from lowcal.report.frontier import Spot, frontier
from lowcal.report.runs import RunData, code_note
from lowcal.report.table import Table, spread_notes

KINDS = rows.KINDS | rivals.KINDS
TIMED = ("results", "equal-accuracy", "equal-time")
ENVIRONMENT = ("device", "device_name", "threads", "torch", "lowcal", "code", "commit", "started")


def write(table: PaperTable, results: Results, seeds: int) -> tuple[Table, list[Path]]:
    """Write the table and its pictures to the results folder, from the finished runs; the table, and the files."""
    measured = Measured(results, table.cells, seeds)
    made = fill(table, results, measured)
    results.begin()
    stem = results.out / results.file_name(table.name)
    files = made.write(stem, **_facts(table, results, measured, made))
    for name, figure in draw(table, results, measured).items():
        for kind in ("svg", "png"):
            files.append(stem.with_name(f"{stem.name}-{name}.{kind}"))
            figures.save(figure, files[-1])
    return made, files


def fill(table: PaperTable, results: Results, measured: Measured) -> Table:
    """The table with its measured figures, and what a reader must know."""
    columns, make_rows = KINDS[table.kind]
    fields = make_rows(table, measured)
    marks = results.marks(table.recipes)
    title = f"{table.title} ({marks}: not the paper's experiment)" if marks else table.title
    runs = [run for own in measured.runs.values() for run in own]
    notes = [*_origin(runs), *results.size_notes(table.recipes), *table.notes]
    notes += [f"{cell.id}: {found}." for cell in table.cells if (found := results.found(cell))]
    unfinished = [cell.id for cell, own in measured.runs.items() if len(own) < measured.seeds]
    if table.kind in ("equal-accuracy", "equal-time") and unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}.")
    notes += spread_notes(row.get("seeds") or 1 for row in fields)
    apart = [f"{row.cell.recipe}, {row.label}" for row in table.rows if measured.is_apart(row.cell)]
    if table.kind in TIMED and apart:
        notes.append(f"Not trained in turn with sgd, so that a drift of the machine may show: {'; '.join(apart)}.")
    if any(row.get("paper_speedup") for row in fields):
        notes.append("The paper's speed-ups are of a GTX 1080 Ti.")
    group = None if table.kind == "equal-time" else "network"
    return Table(columns, fields, title, notes=notes, group=group, drop_empty=True)


def _origin(runs: Sequence[RunData]) -> list[str]:
    environments = [run.environment for run in runs]
    found = {f"{each.get('device_name') or each.get('device')}, torch {each.get('torch')}" for each in environments}
    if not found:
        return ["No run is finished yet."]
    more = "; times of different machines are not compared" if len(found) > 1 else ""
    return [f"Measured on {' and '.join(sorted(found))}{more}.", *filter(None, [code_note(runs)])]


def _facts(table: PaperTable, results: Results, measured: Measured, made: Table) -> dict[str, Any]:
    """What the JSON file holds besides the rows."""
    return {
        "table": table.name,
        "title": made.title,
        "scale": results.scale,
        "settings": list(results.settings),
        "synthetic": sorted(filter(results.is_synthetic, table.recipes)),
        "seeds": measured.seeds,
        "searched": {cell.id: found._asdict() for cell in table.cells if (found := results.found(cell))},
        "notes": list(made.notes),
        "runs": {
            f"{run.path.parent.name}/{run.name}": {name: run.environment.get(name) for name in ENVIRONMENT}
            for own in measured.runs.values()
            for run in own
        },
    }


def draw(table: PaperTable, results: Results, measured: Measured) -> dict[str, Figure]:
    """The table's pictures by name, without those that no run is finished for."""
    if table.has_frontier:
        pictures = {f"frontier-{recipe}": draw_frontier(recipe, results, measured.seeds) for recipe in table.recipes}
        return {name: picture for name, picture in pictures.items() if picture}
    kinds = {
        "boundary": {"boundary": figures.boundary},
        "memory": {"memory": figures.peak_memory, "batch": figures.batch},
    }.get(table.kind, {})
    networks = table.kind == "boundary"  # a line for each network, not for each row
    runs = [
        replace(run, method=row.cell.recipe.partition("-")[0] if networks else row.label)
        for row in table.rows
        for run in measured.runs[row.cell]
    ]
    found = {name: make(runs) for name, make in kinds.items() if runs}
    for figure in found.values():
        with figures.style():
            text = "Boundary, in layers" if networks else figure.get_suptitle()  # networks differ in their layers
            title = _title(text, results, table.recipes)
            figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold")
    return found


def draw_frontier(recipe: str, results: Results, seeds: int) -> Figure | None:
    """Error against time of all finished cells of `recipe`, whichever table they are of; None for none."""
    cells = dict.fromkeys(cell for name in table_names() for cell in results.table(name).cells)
    same_data = [cell for cell in cells if cell.recipe == recipe and not cell.variant.startswith("batch-")]
    measured = Measured(results, same_data, seeds)
    found = curves(recipe, measured)
    spots: dict[str, list[Spot]] = {}
    for cell in same_data:
        if cell.name in found and not cell.variant.startswith("compressed"):
            end = found[cell.name][-1]
            spot = Spot(end.seconds, end.error, cell.variant, measured.is_apart(cell))
            spots.setdefault(cell.method, []).append(spot)
    if not spots:
        return None
    line = [(point.seconds, point.error) for point in compressed_line(found)]
    return frontier(line, spots, title=_title(f"{recipe}: error against time", results, [recipe]))


def _title(text: str, results: Results, recipes: Sequence[str]) -> str:
    marks = results.marks(recipes)
    return f"{text}\n({marks})" if marks else text
