"""The report's figures: a mean line for each method and a thin line for each seed.

Each function takes runs (of `runs.read_runs`) and returns a matplotlib Figure; `save` writes it to a file.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lowcal.errors import LowcalError
from lowcal.files import atomic_write
from lowcal.report.runs import RunData, by_method
from lowcal.report.table import time_unit

INK = "#24292f"
# On a light and on a dark page; Okabe and Ito's hues, which colour-blind readers can tell apart.
_COLOURS = {
    "sgd": (INK, "#e6edf3"),
    "local": ("#0072b2", "#56b4e9"),
    "freeze": ("#d55e00", "#ff9650"),
    "refresh": ("#b8860b", "#f0c94a"),
    "stochastic-depth": ("#00805d", "#35c79a"),
    "prune": ("#a8487f", "#e79cc6"),
}
_OTHERS = (("#6a3fb5", "#b79cf0"), ("#7a6a00", "#cfc04a"), ("#8c2d2d", "#f08a8a"))
# Gaps in the later of two lines keep an earlier, equal line visible; so does a line's width, which falls.
_DASHES: dict[str, Any] = {
    "local": (0, (7, 2)),
    "freeze": (0, (3, 2.5)),
    "refresh": (0, (1, 1.5)),
    "stochastic-depth": (0, (5, 1, 1, 1)),
    "prune": (0, (6, 2, 1, 2)),
}
_RING: dict[str, Any] = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "label": "_move"}
_WIDTHS = (3.4, 2.6, 2.0)
MEAN = "-mean"  # ends the id of a line of means, which starts with "series-" and the method's number

NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_STYLE: dict[Any, Any] = {
    "figure.figsize": (4.9, 3.6),
    "figure.dpi": 72,
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "font.family": ["DejaVu Sans"],
    "axes.labelsize": 13,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.hashsalt": "lowcal",
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK)

_LEGEND: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 1.0),
    "ncols": 3,
    "borderaxespad": 0.1,
    "handlelength": 1.6,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
}

Line = list[tuple[float, float]]


def colours(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return each method's colour on a light page and on a dark one, as #rrggbb."""
    chosen: dict[str, tuple[str, str]] = {}
    for method in methods:
        unknown = sum(name not in _COLOURS for name in chosen)
        chosen[method] = _COLOURS.get(method, _OTHERS[unknown % len(_OTHERS)])
    return chosen


def error_against_time(runs: Sequence[RunData]) -> Figure:
    """Draw top-1 error (percent) after each epoch against the training time so far."""
    longest = max(run.results["seconds"] for run in runs)
    unit, scale = time_unit(longest)
    figure = _figure(
        runs,
        lambda record: (record["total_seconds"] / scale, record["top1_error"]),
        title="Top-1 error, %",
        x_label=f"training time, {unit}",
        logarithmic=True,
        end_marked=True,
        moves_marked=True,
    )
    axes = figure.axes[0]
    axes.set_xlim(0, 1.04 * longest / scale or 1)
    if line := _rival_line(runs, scale):
        look: dict[str, Any] = {
            "color": INK,
            "linestyle": (0, (5, 2)),
            "linewidth": 1.2,
            "marker": "D",
            "markersize": 4,
        }
        with style():
            axes.plot(*_columns(line), **look, label="sgd, compressed")
            axes.legend(**_LEGEND)
    return figure


def _rival_line(runs: Sequence[RunData], scale: float) -> Line:
    """Return the ends of SGD's runs of different lengths, as means over seeds, by time; empty for fewer than two."""
    chosen = [run for run in runs if run.finished and (run.is_rival or run.method == "sgd")]
    groups = by_method(run for run in chosen if run.results["top1_error"] is not None).values()
    ends = [
        (mean(run.results["seconds"] for run in group) / scale, mean(run.results["top1_error"] for run in group))
        for group in groups
    ]
    return sorted(ends) if len(ends) > 1 else []


def boundary(runs: Sequence[RunData]) -> Figure:
    """Draw the boundary in each epoch: the leading layers that did not back-propagate (the paper's Figure 3).

    Methods without a boundary have no line.
    """
    layers = max(run.results["layers"] for run in runs)
    figure = _epoch_figure(runs, "boundary", f"Boundary, of {layers} layers", steps=True, only_boundaries=True)
    axes = figure.axes[0]
    axes.set_ylim(-0.02 * layers, 1.02 * layers)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def step_time(runs: Sequence[RunData]) -> Figure:
    """Draw the time of a training step (ms) in each epoch (the paper's Figure 4)."""
    return _epoch_figure(runs, "step_ms", "Time of a training step, ms", from_zero=True, moves_marked=True)


def peak_memory(runs: Sequence[RunData]) -> Figure:
    """Draw the peak memory of training in each epoch (the paper's Figure 4)."""
    highest = max(record["peak_memory_bytes"] for run in runs for record in run.records)
    power, unit = (3, "GiB") if highest >= 1024**3 else (2, "MiB")
    return _epoch_figure(runs, "peak_memory_bytes", f"Peak memory, {unit}", scale=1024**power, from_zero=True)


def batch(runs: Sequence[RunData]) -> Figure:
    """Draw the images in a mini-batch in each epoch (the paper's Figure 4)."""
    return _epoch_figure(runs, "batch", "Images in a mini-batch", steps=True, from_zero=True)


def loss(runs: Sequence[RunData], *, images: str) -> Figure:
    """Draw the mean loss in each epoch on the training or test images (`images`: "train" or "test")."""
    title = "Training loss" if images == "train" else "Test loss"
    return _epoch_figure(runs, f"{images}_loss", title, logarithmic=True)


FIGURES: dict[str, Callable[[Sequence[RunData]], Figure]] = {
    "error-against-time": error_against_time,
    "boundary": boundary,
    "step-time": step_time,
    "peak-memory": peak_memory,
    "train-loss": partial(loss, images="train"),
    "test-loss": partial(loss, images="test"),
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure on white to `path`, an .svg or .png; LowcalError for another suffix."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise LowcalError(f"a figure cannot be written as {path.name!r}; give a name that ends in .svg or .png")
    atomic_write(path, picture(figure, kind))


def picture(figure: Figure, kind: str) -> bytes:
    """Return a figure on white as the content of a file; `kind` is svg or png."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"metadata": NO_METADATA} if kind == "svg" else {"dpi": 200}
    with style():
        figure.savefig(stream, format=kind, facecolor="white", **options)
    return stream.getvalue()


def style() -> AbstractContextManager[None]:
    """Return the context for making and writing figures."""
    return mpl.rc_context(_STYLE)


def _epoch_figure(runs: Sequence[RunData], field: str, title: str, *, scale: float = 1.0, **options: bool) -> Figure:
    def point(record: dict[str, Any]) -> tuple[float, float | None]:
        value = record[field]
        return record["epoch"] + 1, None if value is None else value / scale

    figure = _figure(runs, point, title=title, x_label="epoch", **options)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    return figure


def _figure(
    runs: Sequence[RunData],
    point: Callable[[dict[str, Any]], tuple[float, float | None]],
    *,
    title: str,
    x_label: str,
    logarithmic: bool = False,
    from_zero: bool = False,
    steps: bool = False,
    end_marked: bool = False,
    moves_marked: bool = False,
    only_boundaries: bool = False,
) -> Figure:
    groups = by_method(runs)
    with style():
        figure = Figure()
        axes = figure.add_subplot()
        figure.suptitle(title, x=0.015, ha="left", fontsize=14, fontweight="bold")
        drawn: Line = []
        rank = 0
        for number, (method, (colour, _dark)) in enumerate(colours(groups).items()):
            group = groups[method]
            if group[0].is_rival or (only_boundaries and not any(run.has_boundary for run in group)):
                continue
            ids = (f"series-{number}-{part}" for part in itertools.count())
            look: dict[str, Any] = {"color": colour, "drawstyle": "steps-mid" if steps else "default"}
            lines = [_points(run, point) for run in group]
            drawn += itertools.chain(*lines)
            if len(lines) > 1:
                for line in lines:
                    axes.plot(*_columns(line), **look, linewidth=0.9, alpha=0.45, label="_seed", gid=next(ids))
            if moves_marked:
                moved = [line[epoch] for line, run in zip(lines, group, strict=True) for epoch in run.moves]
                size = 9 if len(lines) == 1 else 5
                axes.plot(*_columns(moved), **_RING, markersize=size, color=colour, gid=next(ids))
            finished = [line for line, run in zip(lines, group, strict=True) if run.finished]
            average = _average(finished or lines)
            if end_marked and len(finished) > 1:
                _bars(axes, average[-1], [line[-1] for line in finished], colour, ids)
            if len(average) <= 12:
                look |= {"marker": "o", "markersize": 4}
            elif end_marked:
                look |= {"marker": "o", "markersize": 7, "markevery": [-1]}
            look |= {"linestyle": _DASHES.get(method, "-"), "linewidth": _WIDTHS[min(rank, len(_WIDTHS) - 1)]}
            axes.plot(*_columns(average), **look, label=method, gid=f"series-{number}{MEAN}")
            rank += 1
        axes.set_xlabel(x_label)
        axes.margins(x=0.02)
        _set_range(axes, drawn, logarithmic=logarithmic, from_zero=from_zero)
        if drawn:
            axes.legend(**_LEGEND)
    return figure


def _bars(axes: Axes, centre: tuple[float, float], ends: Line, colour: str, ids: Iterator[str]) -> None:
    """Draw bars through `centre` from the lowest to the highest seed, in x and in y."""
    look: dict[str, Any] = {"color": colour, "linewidth": 1.4, "markersize": 8, "label": "_bar"}
    (x, y), (xs, ys) = centre, _columns(ends)
    axes.plot([min(xs), max(xs)], [y, y], marker="|", gid=next(ids), **look)
    axes.plot([x, x], [min(ys), max(ys)], marker="_", gid=next(ids), **look)


def _points(run: RunData, point: Callable[[dict[str, Any]], tuple[float, float | None]]) -> Line:
    return [(x, math.nan if y is None else y) for x, y in map(point, run.records)]


def _columns(line: Line) -> tuple[list[float], list[float]]:
    return [x for x, _ in line], [y for _, y in line]


def _average(lines: Sequence[Line]) -> Line:
    """Return the mean of x and of y over the epochs that all lines have."""
    return [(mean(x for x, _ in points), mean(y for _, y in points)) for points in zip(*lines, strict=False)]


def _set_range(axes: Axes, drawn: Line, *, logarithmic: bool, from_zero: bool) -> None:
    values = [y for _, y in drawn if math.isfinite(y)]
    if not values:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center")
        return
    low, high = min(values), max(values)
    if from_zero:
        axes.set_ylim(0, 1.05 * high or 1)
    elif logarithmic and low > 0 and high > 4 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.08, high * 1.08)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        fractions = (1,) if high > 1e4 * low else (1, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)
        ticks = [part * 10.0**power for power in powers for part in fractions]
        axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.08 <= tick <= high * 1.08]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
