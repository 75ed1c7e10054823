"""A sweep's report: its trials as JSON, CSV and Markdown, and each objective against each searched setting."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lowcal.files import FORMAT, write_json
from lowcal.report.figures import INK, colours, save, style
from lowcal.report.table import ABSENT, Column, Table, spread_notes

__all__ = ["SweepReport", "short_names", "sweep_table", "sweep_text", "write_sweep"]

MOST_TRIALS = 20  # that are printed; the files have all
WIDEST_REASON = 60

_TITLES = {
    "top1_error": "top-1 error, %",
    "best_top1_error": "lowest top-1 error, %",
    "seconds": "training time, s",
    "flops": "training FLOPs",
}
_RESULTS = (*_TITLES, "top1_error_std", "seconds_std", "boundary", "layers", "device", "reason")


@dataclass(frozen=True)
class SweepReport:
    """What `write_sweep` wrote: the content of `sweep.json`, and the files."""

    summary: dict[str, Any]
    files: tuple[Path, ...]


def write_sweep(rows: Sequence[Mapping[str, Any]], heading: Mapping[str, Any], out: Path) -> SweepReport:
    """Write `sweep.json`, `sweep.csv`, `sweep.md` and `sweep.svg` to the folder `out`.

    Args:
        rows: the trials, each with `trial`, `settings` (by key), its results, and `reason` where there are none.
        heading: what the sweep is; `objectives` are the names of the results that were minimised, `best` the numbers of
            the trials that no other beats.
    """
    summary = {"format": FORMAT, **heading, "rows": list(rows)}
    flat = [{"trial": row["trial"], **row["settings"], **{name: row[name] for name in _RESULTS}} for row in rows]
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as made:  # several workers may write at once
        folder = Path(made)
        write_json(folder / "sweep.json", summary)
        (folder / "sweep.csv").write_text(Table((), flat).csv(), encoding="utf-8")
        (folder / "sweep.md").write_text(_markdown(summary), encoding="utf-8")
        if any(row["reason"] is None for row in rows):
            save(sweep_figure(summary), folder / "sweep.svg")
        files = [file.replace(out / file.name) for file in sorted(folder.iterdir())]
    return SweepReport(summary, tuple(files))


def sweep_table(summary: Mapping[str, Any]) -> Table:
    """Return the trials as a table: those of a grid in order, others the best first; `*` marks the best."""
    first = summary["objectives"][0]
    rows = [
        {**row, "seeds": summary["seeds"], "mark": row["reason"] or "*" * (row["trial"] in summary["best"])}
        for row in summary["rows"]
    ]
    if summary["sampler"] != "grid":
        rows.sort(key=lambda row: math.inf if row[first] is None else row[first])
    names = short_names(_keys(rows))
    columns = [
        Column("trial", "trial", "number"),
        *(Column(key, name, partial(_setting_of, key)) for key, name in names.items()),
        Column("top1_error", _TITLES["top1_error"], ".2f"),
        *(Column(name, _TITLES[name], ".4g") for name in summary["objectives"] if name in ("best_top1_error", "flops")),
        Column("seconds", "time", "duration"),
        Column("boundary", "boundary", _boundary),
        Column("mark", ""),
    ]
    return Table(columns, rows)


def sweep_text(summary: Mapping[str, Any]) -> str:
    """Return the table as text, without a grid's order cut to the best trials."""
    table = sweep_table(summary)
    rows = table.rows if summary["sampler"] == "grid" else table.rows[:MOST_TRIALS]
    left_out = len(table.rows) - len(rows)
    text = replace(table, rows=[{**row, "mark": row["mark"][:WIDEST_REASON]} for row in rows]).text()
    return f"{text}\n... and {left_out} more" if left_out else text


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return each dotted key's shortest end that tells it from the others: `alpha` for `local.schedule.alpha`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        names[key] = next((end for end in ends if not any(f".{o}".endswith(f".{end}") for o in keys if o != key)), key)
    return names


def sweep_figure(summary: Mapping[str, Any]) -> Figure:
    """Draw each objective (rows) against each searched setting (columns); the best trials are ringed."""
    rows = [row for row in summary["rows"] if row["reason"] is None]
    keys, objectives = _keys(rows), summary["objectives"]
    names = short_names(keys)
    colour = colours([summary["method"]])[summary["method"]][0]
    with style():
        figure = Figure(figsize=(4.2 * len(keys), 0.6 + 3.1 * len(objectives)))
        grid = figure.subplots(len(objectives), len(keys), squeeze=False, sharey="row")
        figure.suptitle(f"{summary['title']}: {summary['method']}", x=0.015, ha="left", fontsize=14, fontweight="bold")
        for line, objective in zip(grid, objectives, strict=True):
            for axes, key in zip(line, keys, strict=True):
                _draw(axes, rows, key, objective, colour, summary)
                axes.set_xlabel(names[key])
            line[0].set_ylabel(_TITLES[objective])
    return figure


def _draw(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, objective: str, colour: str, summary: Mapping[str, Any]
) -> None:
    """Draw an objective against a setting: numbers on a scale, other values side by side."""
    values = [row["settings"][key] for row in rows]
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    xs = values if is_numeric else list(map(_setting, values))
    if key in summary["logarithmic"]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if max(values) > 100 * min(values) else (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    scale = 1 / math.sqrt(2) if summary["seeds"] == 2 else 1.0  # the bars of two seeds end at their two values
    points = sorted(
        (x, row[objective], scale * (row.get(f"{objective}_std") or 0.0)) for x, row in zip(xs, rows, strict=True)
    )
    deviations = [deviation for _, _, deviation in points]
    look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "elinewidth": 1.2}
    axes.errorbar(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        deviations if any(deviations) else None,
        linestyle="-" if len(rows[0]["settings"]) == 1 else "none",
        **look,
    )
    best = [(x, row[objective]) for x, row in zip(xs, rows, strict=True) if row["trial"] in summary["best"]]
    ring: dict[str, Any] = {
        "linestyle": "none",
        "marker": "o",
        "markersize": 11,
        "markerfacecolor": "none",
        "markeredgecolor": INK,
    }
    axes.plot([x for x, _ in best], [y for _, y in best], **ring)
    if not is_numeric:
        axes.set_xlim(-0.5, len(set(xs)) - 0.5)


def _markdown(summary: Mapping[str, Any]) -> str:
    where = (
        f"{summary['model']} on {summary['dataset']}, {summary['evaluate']} images, {summary['seeds']} seed(s) a trial"
    )
    searched = ", ".join(f"`{search}`" for search in summary["search"])
    notes = " ".join(["\\* marks the best.", *spread_notes([summary["seeds"]])])
    title = f"{summary['title']}: {summary['method']}"
    return f"{title}\n\n{where}; searched: {searched}. {notes}\n\n{sweep_table(summary).markdown()}"


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row["settings"]))


def _setting_of(key: str, row: Mapping[str, Any]) -> str:
    return _setting(row["settings"].get(key))


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _boundary(row: Mapping[str, Any]) -> str:
    return ABSENT if row["boundary"] is None else f"{round(row['boundary'], 1):g}/{row['layers']:g}"
