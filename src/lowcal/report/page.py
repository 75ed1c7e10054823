"""The report of one or several runs: summary.json, .csv, .md and one self-contained HTML page."""

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from lowcal.errors import LowcalError
from lowcal.files import FORMAT, atomic_write, read_json
from lowcal.report.comparison import Row, comparison_table, make_rows
from lowcal.report.figures import FIGURES, colours
from lowcal.report.headline import batch_changes, common_title, comparison_notes, findings, headline
from lowcal.report.inline import inline_svg, plot_data
from lowcal.report.runs import RunData, by_method, code_note, read_runs
from lowcal.report.table import Table, spread_notes
from lowcal.training.run_folder import RunFolder

_CAPTIONS = {
    "error-against-time": "Lower and further left is better. A line ends with its last epoch. Rings mark moves.",
    "boundary": "How many leading layers did not back-propagate in each epoch.",
    "step-time": "Each time the boundary moves (a ring), a step should get shorter.",
    "peak-memory": "Layers that do not back-propagate keep no activations.",
    "train-loss": "Mean over each epoch's training images.",
    "test-loss": "On the test images, after each epoch.",
}
_WORDS = {
    "boundary": "so many leading layers do not back-propagate; it starts at 0 and moves on from epoch to epoch",
    "sgd": "all layers learn by SGD",
    "local": "layers before the boundary learn by local (Hebbian) updates, made in the forward pass",
    "freeze": "layers before the boundary keep their weights",
    "refresh": "layers before the boundary are frozen, but for every few steps with a true gradient",
    "stochastic-depth": "residual blocks are left out of a step at random",
    "prune": "channels that reach zero are removed",
    "sgd-compressed": "SGD whose schedule takes no longer than another method",
}
# The names in environment.json and the page's words for them.
_ENVIRONMENT = {
    "device": "device",
    "device_name": "device name",
    "processor": "processor",
    "cores": "cores",
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
    page = _render(data, rows, table, summary, out)
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


def _render(runs: Sequence[RunData], rows: Sequence[Row], table: Table, summary: dict[str, Any], out: Path) -> str:
    methods = colours(by_method(runs))
    lights = [light for light, _dark in methods.values()]
    figures = []
    for name, draw in FIGURES.items():
        if name == "boundary" and not any(run.has_boundary for run in runs):
            continue
        figure = draw(runs)
        svg = Markup(inline_svg(figure, name, lights, _spoken(name)))
        figures.append({"svg": svg, "caption": _CAPTIONS[name], "plot": json.dumps(plot_data(figure))})
    script = (files(__package__) / "page.js").read_text(encoding="utf-8")
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((files(__package__) / "template.html").read_text(encoding="utf-8"))
    return template.render(
        subject=summary["title"],
        findings=findings(rows),
        columns=[column.heading for column in table.shown],
        lines=[
            list(zip(cells, [number, *(row[column.name] for column in table.shown[1:])], strict=True))
            for number, (cells, row) in enumerate(zip(table.cells(), table.rows, strict=True))
        ],
        notes=table.notes,
        words={word: meaning for word, meaning in _WORDS.items() if _is_used(word, runs)},
        colours=list(methods.values()),
        figures=figures,
        several=any(len(group) > 1 for group in by_method(runs).values()),
        commands=list(dict.fromkeys(filter(None, (run.environment.get("command") for run in runs)))),
        links=[(run.name, quote(Path(relpath(run.path, out)).as_posix())) for run in runs],
        facts=_facts(summary["environment"]),
        recipes=_recipes(runs),
        script=Markup(script),
        digest=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _facts(environment: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return where it ran, with the page's words; on a processor its name once."""
    known = {name: environment[name] for name in _ENVIRONMENT if environment[name] is not None}
    if known.get("device_name") == known.get("processor"):
        known.pop("device_name", None)
    return [(_ENVIRONMENT[name], value) for name, value in known.items()]


def _is_used(word: str, runs: Sequence[RunData]) -> bool:
    """Whether one of the runs needs this word."""
    if word == "boundary":
        return any(run.has_boundary for run in runs)
    known = {max((each for each in _WORDS if run.method.startswith(each)), key=len, default="") for run in runs}
    return word in known


def _spoken(name: str) -> str:
    return f"{name.replace('-', ' ')}, a line for each method"


def _recipes(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Return the different recipes (apart from the seed) with the names of their runs."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(repr(run.settings), []).append(run)
    return [(", ".join(run.name for run in group), group[0].recipe_text) for group in groups.values()]
