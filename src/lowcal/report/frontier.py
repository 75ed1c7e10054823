"""Top-1 error against training time of whole trainings, one point each, and the line that they must beat."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lowcal.report.figures import INK, colours, style
from lowcal.report.labels import Label, place_labels
from lowcal.report.table import time_unit

__all__ = ["Spot", "frontier"]


class Spot(NamedTuple):
    """A whole training: its time, its top-1 error in percent, and what stands beside the point.

    `is_apart`: it did not take turns with SGD's, so that a drift of the machine may be in its time.
    """

    seconds: float
    error: float
    text: str
    is_apart: bool = False


_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def frontier(line: Sequence[tuple[float, float]], spots: Mapping[str, Sequence[Spot]], *, title: str) -> Figure:
    """Draw `line`, SGD with its schedule compressed into less and less time, and each method's settings as points.

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
