"""The report of one or several runs: summary.json, .csv, .md and one self-contained HTML page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lowcal.errors import LowcalError
from lowcal.files import FORMAT, atomic_write, read_json
from lowcal.report.comparison import Row, comparison_table, make_rows
from lowcal.report.figures import FIGURES, colours, inline_svg
from lowcal.report.headline import batch_changes, common_title, comparison_notes, headline
from lowcal.report.runs import RunData, by_method, code_note, read_runs
from lowcal.report.table import Table, spread_notes
from lowcal.training.run_folder import RunFolder

_CAPTIONS = {
    "error-against-time": "Lower and further left is better. A line ends with its last epoch.",
    "boundary": "How many leading layers did not back-propagate in each epoch.",
    "step-time": "Each time the boundary moves, a step should get shorter.",
    "peak-memory": "Layers that do not back-propagate keep no activations.",
    "train-loss": "Mean over each epoch's training images.",
    "test-loss": "On the test images, after each epoch.",
}
# The names in environment.json and the page's words for them.
_ENVIRONMENT = {
    "device": "device",
    "device_name": "processor",
    "threads": "threads",
    "platform": "platform",
    "python": "Python",
    "torch": "torch",
    "torchvision": "torchvision",
    "lowcal": "lowcal",
    "code": "code",
    "commit": "commit",
    "started": "started",
}


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote: `summary` is the content of summary.json, `notes` explain the table.

    `folders` are those of the runs.
    """

    folders: Sequence[Path]
    rows: Sequence[Row]
    summary: dict[str, Any]
    headline: str
    notes: Sequence[str]
    page: Path


def write_report(runs: Path | Sequence[Path], out: Path | None = None) -> Report:
    """Write `summary.json`, `summary.csv`, `summary.md` and `report.html` to `out`.

    Args:
        runs: a comparison's folder, or several folders, each of a run or of a comparison.
        out: may be None for a comparison's folder, which is then used.

    Raises:
        LowcalError: the runs cannot be read or shown together, or `out` holds a run or another program's
            summary.json; nothing is written.
    """
    paths = [runs] if isinstance(runs, Path) else list(runs)
    if out is None:
        if not isinstance(runs, Path):
            raise LowcalError("the folder for the report is missing; give --out DIR")
        out = runs
    _refuse_unless_ours(out)
    data = read_runs(paths)
    rows = make_rows(data)
    summary = _summary(data)
    notes = _notes(data, rows, summary)
    table = comparison_table(rows, headline(rows), lead=[f"{summary['title']}."], notes=[*_origin(summary), *notes])
    page = _render(data, table, summary)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LowcalError(f"cannot make {out}: {error.strerror}; choose another folder") from error
    table.write(out / "summary", **summary)
    atomic_write(out / "report.html", page.encode())
    content = summary | {"format": FORMAT, "rows": table.rows}
    return Report([run.path for run in data], rows, content, table.title, notes, out / "report.html")


def _refuse_unless_ours(out: Path) -> None:
    if RunFolder.holds_run(out):
        raise LowcalError(f"{out} holds a run, whose summary.json would be lost; give another folder by --out")
    if (out / "summary.json").exists() and "rows" not in read_json(out / "summary.json"):
        raise LowcalError(f"{out / 'summary.json'} is not a comparison's; give another folder by --out")


def _summary(runs: Sequence[RunData]) -> dict[str, Any]:
    return {
        "recipe": _common(run.recipe for run in runs),
        "model": runs[0].model,
        "dataset": runs[0].dataset,
        "label": _common(run.label for run in runs if run.label),
        "title": common_title([run.titled for run in runs]),
        "environment": {name: _common(run.environment.get(name) for run in runs) for name in _ENVIRONMENT}
        | {"started": min((run.environment.get("started") or "" for run in runs), default="") or None},
        "settings": runs[0].settings,
        "unfinished": [
            {"run": run.name, "epochs": len(run.records), "planned": run.planned} for run in runs if not run.finished
        ],
    }


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all share, else a text with the different ones."""
    known = list(dict.fromkeys(value for value in values if value is not None))
    return known[0] if len(known) == 1 else ", ".join(map(str, known)) or None


def _origin(summary: dict[str, Any]) -> list[str]:
    """Return where the runs were made, and by which recipe."""
    machine = summary["environment"]
    ran = f"Ran on {machine['device_name'] or machine['device']}, torch {machine['torch']}."
    return [ran, f"Recipe: {summary['label'] or summary['recipe']}."]


def _notes(runs: Sequence[RunData], rows: Sequence[Row], summary: dict[str, Any]) -> list[str]:
    """Return the notes that explain the table."""
    notes = [*spread_notes(row.seeds for row in rows), *comparison_notes(runs, rows)]
    if changed := [f"{run.name} {change}" for run in runs if (change := batch_changes(run))]:
        notes.append(f"Batch: {'; '.join(changed)}.")
    if unfinished := summary["unfinished"]:
        names = ", ".join(f"{run['run']} ({run['epochs']} of {run['planned']} epochs)" for run in unfinished)
        notes.append(f"Unfinished: {names}.")
    if len({run.machine for run in runs}) > 1:
        notes.append("The runs ran on different machines: their times are not compared.")
    if code := code_note(runs):
        notes.append(code)
    return notes


def _render(runs: Sequence[RunData], table: Table, summary: dict[str, Any]) -> str:
    methods = colours(by_method(runs))
    lights = [light for light, _dark in methods.values()]
    figures = [
        {"svg": Markup(inline_svg(draw(runs), name, lights, _spoken(name))), "caption": _CAPTIONS[name]}
        for name, draw in FIGURES.items()
    ]
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((files(__package__) / "template.html").read_text(encoding="utf-8"))
    return template.render(
        subject=summary["title"],
        headline=table.title,
        columns=[column.heading for column in table.shown],
        lines=table.cells(),
        notes=table.notes,
        colours=list(methods.values()),
        figures=figures,
        several=any(len(group) > 1 for group in by_method(runs).values()),
        facts=[(word, summary["environment"][name]) for name, word in _ENVIRONMENT.items()],
        recipes=_recipes(runs),
    )


def _spoken(name: str) -> str:
    return f"{name.replace('-', ' ')}, a line for each method"


def _recipes(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Return the different recipes (apart from the seed) with the names of their runs."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(repr(run.settings), []).append(run)
    return [(", ".join(run.name for run in group), group[0].recipe_text) for group in groups.values()]
