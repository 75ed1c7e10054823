"""Draw whole trainings as points of error against time, beside the line of SGD that they must beat."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lowcal.report.figures import INK, colours, style
from lowcal.report.table import time_unit


class Spot(NamedTuple):
    """A whole training: its time, its top-1 error in percent, and the label of its point.

    `is_apart`: it was not trained in turn with SGD, so its time may include a drift of the machine.
    """

    seconds: float
    error: float
    text: str
    is_apart: bool = False


_MARK = 8.0  # typographic points that a mark is wide and high
_GAPS = (2.0, 9.0, 17.0, 26.0, 37.0, 50.0)  # between a mark and its label
_LEADER = 9.0  # the gap from which on a thin line leads to the label
_SIDES = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def frontier(line: Sequence[tuple[float, float]], spots: Mapping[str, Sequence[Spot]], *, title: str) -> Figure:
    """Draw `line`, SGD with its schedule compressed into less and less time, and each training as a point.

    Args:
        line: (seconds of training, top-1 error in percent) in the order of time; nothing is drawn with less than two.
        spots: by method. A point below the line has less error than SGD has in the same time.
    """
    every = [spot for group in spots.values() for spot in group]
    seconds = [second for second, _ in line] + [spot.seconds for spot in every]
    unit, scale = time_unit(max(seconds, default=0.0))
    with style():
        figure = Figure(figsize=(6.4, 4.8))
        axes = figure.add_subplot()
        figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold")
        look: dict[str, Any] = {"color": INK, "linestyle": (0, (5, 2)), "linewidth": 1.4, "marker": ".", "zorder": 1}
        line_points = [(x / scale, y) for x, y in line] if len(line) > 1 else []
        if line_points:
            axes.plot(*zip(*line_points, strict=True), **look, label="sgd, compressed")
        labels = []
        for (method, (colour, _dark)), marker in zip(colours(spots).items(), _MARKERS * len(spots), strict=False):
            look = {"color": colour, "linestyle": "none", "marker": marker, "markersize": 7}
            for is_apart, fill in ((False, colour), (True, "none")):
                group = [spot for spot in spots[method] if spot.is_apart == is_apart]
                axes.plot(
                    [spot.seconds / scale for spot in group],
                    [spot.error for spot in group],
                    **look,
                    markerfacecolor=fill,
                    label="_apart" if is_apart else method,
                )
            labels += [
                Label(spot.seconds / scale, spot.error, spot.text, colour) for spot in spots[method] if spot.text
            ]
        if any(spot.is_apart for spot in every):
            axes.plot([], [], "o", color=INK, markerfacecolor="none", label="not in turn")
        axes.set_xlabel(f"training time, {unit}")
        axes.set_ylabel("top-1 error, %")
        axes.margins(0.08)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.1, handlelength=1.6, fontsize=10
        )
        marks = [*line_points, *((spot.seconds / scale, spot.error) for spot in every)]
        place_labels(axes, labels, marks)
    return figure


@dataclass(frozen=True)
class Label:
    """The text beside the point (x, y), in the data's units."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(axes: Axes, labels: Iterable[Label], marks: Sequence[tuple[float, float]], *, size: float = 8) -> None:
    """Write each label at the nearest place to its point where it covers no mark and no other label.

    Call it after everything else is drawn. `marks` are the points of all marks.
    """
    canvas = FigureCanvasAgg(axes.figure)  # type: ignore[arg-type]  # matplotlib before 3.10 has no get_figure(root=True)
    canvas.draw()  # settles the layout
    unit = canvas.figure.dpi / 72  # pixels in a typographic point
    frame = axes.get_window_extent()
    centres = (axes.transData.transform(mark) for mark in marks)
    full = [_box(x, y, _MARK * unit, _MARK * unit) for x, y in centres]
    for label in sorted(labels, key=lambda label: (label.x, label.y, label.text)):
        trial = axes.text(label.x, label.y, label.text, fontsize=size)
        extent = trial.get_window_extent(canvas.get_renderer())
        trial.remove()
        x, y = axes.transData.transform((label.x, label.y))
        best: tuple[float, float, float, float, Bbox] | None = None
        for gap, (right, up) in product(_GAPS, _SIDES):
            reach = (_MARK / 2 + gap) * unit
            dx, dy = right * (reach + extent.width / 2), up * (reach + extent.height / 2)
            box = _box(x + dx, y + dy, extent.width, extent.height)
            covered = sum(_overlap(box, other) for other in full) + box.width * box.height - _overlap(box, frame)
            if best is None or covered < best[0]:
                best = covered, gap, dx / unit, dy / unit, box
            if not covered:
                break
        assert best is not None
        _, gap, right_by, up_by, box = best
        full.append(box)
        leader = {"arrowstyle": "-", "linewidth": 0.6, "color": label.colour, "shrinkA": 0, "shrinkB": 3}
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(right_by, up_by),
            textcoords="offset points",
            fontsize=size,
            color=label.colour,
            horizontalalignment="center",
            verticalalignment="center",
            arrowprops=leader if gap >= _LEADER else None,
        )
        text.set_in_layout(False)


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    """The box around (x, y)."""
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    """The area that two boxes share."""
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else shared.width * shared.height
