"""A sweep's report: its trials as JSON, CSV and Markdown, and each objective against each searched setting."""

import csv
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..training.files import FORMAT, write_json
from .figures import INK, colours, save, style
from .intervals import ABSENT, spread_notes, with_spread
from .tables import duration

__all__ = ["SweepReport", "short_names", "sweep_cells", "write_sweep"]

_RESULTS = ("top1_error", "best_top1_error", "seconds", "flops")
_TITLES = {
    "top1_error": "top-1 error, %",
    "best_top1_error": "lowest top-1 error, %",
    "seconds": "training time, s",
    "flops": "training FLOPs",
}


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
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as made:  # several workers may write at once
        folder = Path(made)
        write_json(folder / "sweep.json", summary)
        (folder / "sweep.csv").write_text(_csv(rows), encoding="utf-8")
        (folder / "sweep.md").write_text(_markdown(summary), encoding="utf-8")
        if any(row["reason"] is None for row in rows):
            save(sweep_figure(summary), folder / "sweep.svg")
        files = [file.replace(out / file.name) for file in sorted(folder.iterdir())]
    return SweepReport(summary, tuple(files))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return each dotted key's shortest end that tells it from the others: `alpha` for `local.schedule.alpha`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        names[key] = next((end for end in ends if not any(f".{o}".endswith(f".{end}") for o in keys if o != key)), key)
    return names


def sweep_cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table's headings and its lines: a grid's in order, else the best first; `*` marks the best."""
    keys = _keys(summary["rows"])
    names = short_names(keys)
    more = [name for name in summary["objectives"] if name in ("best_top1_error", "flops")]
    headings = ["trial", *names.values(), "top-1 error, %", *(_TITLES[name] for name in more), "time", "boundary", ""]
    rows = list(summary["rows"])
    if summary["sampler"] != "grid":
        first = summary["objectives"][0]
        rows.sort(key=lambda row: math.inf if row[first] is None else row[first])
    lines = []
    for row in rows:
        line = [str(row["trial"]), *(_setting(row["settings"].get(key)) for key in keys)]
        if row["reason"] is not None:
            line += [ABSENT] * (3 + len(more)) + [row["reason"]]
        else:
            error = with_spread(row["top1_error"], row["top1_error_std"], summary["seeds"], 2)
            boundary = f"{round(row['boundary'], 1):g}/{row['layers']:g}"
            line += [error, *(f"{row[name]:.4g}" for name in more), duration(row["seconds"]), boundary]
            line.append("*" if row["trial"] in summary["best"] else "")
        lines.append(line)
    return headings, lines


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
    place = _places(axes, [row["settings"][key] for row in rows])
    if key in summary["logarithmic"]:
        values = [row["settings"][key] for row in rows]
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if max(values) > 100 * min(values) else (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    chosen = sorted(rows, key=lambda row: place(row["settings"][key]))
    xs = [place(row["settings"][key]) for row in chosen]
    ys = [row[objective] for row in chosen]
    scale = 1 / math.sqrt(2) if summary["seeds"] == 2 else 1.0  # the bars of two seeds end at their two values
    deviations = [scale * (row.get(f"{objective}_std") or 0.0) for row in chosen]
    alone = len(rows[0]["settings"]) == 1
    look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "elinewidth": 1.2}
    axes.errorbar(xs, ys, deviations if any(deviations) else None, linestyle="-" if alone else "none", **look)
    best = [row for row in rows if row["trial"] in summary["best"]]
    axes.plot(
        [place(row["settings"][key]) for row in best],
        [row[objective] for row in best],
        linestyle="none", marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK,
    )  # fmt: skip


def _places(axes: Axes, values: Sequence[Any]) -> Callable[[Any], float]:
    """Where values lie on the x-axis: numbers where they are, other values side by side."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return float
    labels = sorted({_setting(value) for value in values})
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    return lambda value: float(labels.index(_setting(value)))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = _keys(rows)
    results = [*_RESULTS, "top1_error_std", "seconds_std", "boundary", "layers", "device", "reason"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", *keys, *results])
    for row in rows:
        settings = [row["settings"].get(key) for key in keys]
        writer.writerow([row["trial"], *settings, *(row[name] for name in results)])
    return stream.getvalue()


def _markdown(summary: Mapping[str, Any]) -> str:
    headings, lines = sweep_cells(summary)
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    table = [headings, ["---:"] * (len(headings) - 1) + ["---"], *cells]
    where = (
        f"{summary['model']} on {summary['dataset']}, {summary['evaluate']} images, {summary['seeds']} seed(s) a trial"
    )
    searched = ", ".join(f"`{search}`" for search in summary["search"])
    notes = " ".join(["\\* marks the best.", *spread_notes([summary["seeds"]])])
    title = f"{summary['title']}: {summary['method']}\n\n{where}; searched: {searched}. {notes}\n\n"
    return title + "".join(f"| {' | '.join(line)} |\n" for line in table)


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row["settings"]))


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
