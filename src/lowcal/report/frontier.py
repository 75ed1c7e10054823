"""Top-1 error against training time of whole trainings, one point each, and the line that they must beat."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .figures import INK, colours, style
from .tables import time_unit

__all__ = ["frontier"]

Spot = tuple[float, float, str]
"""Seconds of training, top-1 error in percent, and what stands beside the point."""

_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def frontier(line: Sequence[tuple[float, float]], spots: Mapping[str, Sequence[Spot]], *, title: str) -> Figure:
    """Draw `line`, SGD with its schedule compressed into less and less time, and each method's settings as points.

    Args:
        line: (seconds of training, top-1 error in percent) in the order of time; nothing is drawn with less than two.
        spots: by method. A point below the line has less error than SGD has in the same time.
    """
    seconds = [second for second, _ in line] + [spot[0] for group in spots.values() for spot in group]
    unit, scale = time_unit(max(seconds, default=0.0))
    with style():
        figure = Figure(figsize=(6.4, 4.8))
        axes = figure.add_subplot()
        figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold")
        look: dict[str, Any] = {"color": INK, "linestyle": (0, (5, 2)), "linewidth": 1.4, "marker": ".", "zorder": 1}
        if len(line) > 1:
            axes.plot([x / scale for x, _ in line], [y for _, y in line], **look, label="sgd, compressed")
        for (method, (colour, _dark)), marker in zip(colours(spots).items(), _MARKERS * len(spots), strict=False):
            group = spots[method]
            axes.plot(
                [spot[0] / scale for spot in group],
                [spot[1] for spot in group],
                color=colour,
                linestyle="none",
                marker=marker,
                markersize=7,
                label=method,
            )
            for x, y, text in group:
                if text:
                    axes.annotate(
                        text, (x / scale, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour
                    )
        axes.set_xlabel(f"training time, {unit}")
        axes.set_ylabel("top-1 error, %")
        axes.margins(0.08)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.1, handlelength=1.6, fontsize=11
        )
    return figure
