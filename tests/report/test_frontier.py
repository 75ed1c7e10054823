"""The frontier picture: what is drawn, and that its labels can be read."""

import random
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from lowcal.report.frontier import Spot, frontier

LINE = [(60.0, 8.0), (80.0, 7.0), (100.0, 6.0)]


def crowd(count, seed=0):
    """Settings whose times and errors lie close together, as those of one method do."""
    chosen = random.Random(seed)
    return [Spot(80 + 8 * chosen.random(), 6.5 + 0.8 * chosen.random(), f"alpha-{index}.5") for index in range(count)]


def drawn(figure):
    """The axes, the labels' boxes by text, and the marks' boxes, in pixels of a laid-out figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, renderer = figure.axes[0], canvas.get_renderer()
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in labels}
    points = [point for line in axes.lines for point in axes.transData.transform(line.get_xydata())]
    marks = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in points]
    return axes, boxes, marks


@pytest.mark.parametrize("seed", range(2))
def test_labels_cover_neither_one_another_nor_a_mark_and_stay_inside(seed):
    spots = {"sgd": [Spot(100, 6.0, "")], "local": crowd(6, seed), "freeze": crowd(6, seed + 50)}
    spots["freeze"] = [spot._replace(text=f"most-{spot.text}") for spot in spots["freeze"]]
    axes, boxes, marks = drawn(frontier(LINE, spots, title="a network"))
    assert len(boxes) == 12
    frame = axes.get_window_extent().padded(1)
    for box in boxes.values():
        assert frame.containsx(box.x0)
        assert frame.containsx(box.x1)
        assert frame.containsy(box.y0)
        assert frame.containsy(box.y1)
        assert not any(box.padded(-0.5).overlaps(mark) for mark in marks)
    assert not any(one.padded(-0.5).overlaps(other.padded(-0.5)) for one, other in combinations(boxes.values(), 2))


def test_what_did_not_take_turns_is_hollow_and_the_legend_says_so():
    spots = {"sgd": [Spot(100, 6.0, "")], "local": [Spot(90, 6.5, "", True), Spot(80, 6.6, "")]}
    axes = frontier(LINE, spots, title="a network").axes[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["sgd, compressed", "sgd", "local", "not in turn"]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in hollow] == [[6.5]]
    alone = frontier([], {"sgd": [Spot(100, 6.0, "")]}, title="a network").axes[0]
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["sgd"]
