"""Text beside points, moved about until it covers neither points nor other text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

__all__ = ["Label", "place_labels"]

_MARK = 8.0  # typographic points that a mark is wide and high
_GAPS = (2.0, 9.0, 17.0, 26.0, 37.0, 50.0)  # between a mark and its label
_LEADER = 9.0  # the gap from which on a thin line leads to the label
_SIDES = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))


@dataclass(frozen=True)
class Label:
    """What stands beside the point (x, y), in the data's units."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(axes: Axes, labels: Iterable[Label], marks: Sequence[tuple[float, float]], *, size: float = 8) -> None:
    """Write each label as near to its point as it covers nothing, in the order of x; `marks` are all that is marked.

    To be called when all else is drawn, since places are tried against the axes as they are.
    """
    figure = axes.get_figure(root=True)
    canvas = FigureCanvasAgg(figure)
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
