"""A figure within a page: an <svg> element in the page's colours and font, and the data that a script shows over it."""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lowcal.report.figures import INK, MEAN, NO_METADATA, style

_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|<defs>\s*</defs>", re.DOTALL)
_NAMESPACES = re.compile(r' (?:xmlns(?::\w+)?|version)="[^"]*"')
_SIZE = re.compile(r' (?:width|height)="[^"]*"')
_FONT = re.compile(r"font: (?:(bold|[0-9]+) )?([0-9.]+px) [^;\"]*")
_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")


def inline_svg(figure: Figure, name: str, colours: Sequence[str], label: str) -> str:
    """Return a figure as an <svg> element; `label` is read out, `name` keeps its ids apart from others'.

    What is drawn in the i-th of `colours` (#rrggbb) gets the colour `var(--series-i)`, which the page
    defines; axes and text get the page's text colour, and the text its font.
    """
    stream = io.StringIO()
    with style(), mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    whole = stream.getvalue()
    opening, rest = whole[whole.index("<svg") :].split(">", 1)
    opening = _SIZE.sub("", _NAMESPACES.sub("", opening))
    rest = _LEFT_OUT.sub("", rest).replace("xlink:href", "href")
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", rest)
    rest = _FONT.sub(lambda found: f"font-weight: {found[1] or 400}; font-size: {found[2]}", rest)
    rest = _FAMILY.sub("", rest)
    for index, colour in enumerate(colours):
        if colour != INK:
            rest = rest.replace(colour, f"var(--series-{index})")
    return f'{opening} role="img" aria-label="{html.escape(label)}">{rest.replace(INK, "currentColor")}'


def plot_data(figure: Figure) -> dict[str, Any]:
    """Return what places a figure's points in its <svg>: call it after `inline_svg`, which lays the figure out.

    `box` has the axes' edges (left, top, right, bottom) in the units of the viewBox, `x` and `y` what these edges
    stand for, `units` the units of x and y, and `series` each method's mean (x, y) after each epoch, by its number.
    """
    (axes,) = figure.axes
    box, height = axes.get_window_extent(), figure.bbox.height
    lines = [line for line in axes.get_lines() if str(line.get_gid()).endswith(MEAN)]
    return {
        "box": [round(edge, 1) for edge in (box.x0, height - box.y1, box.x1, height - box.y0)],
        "x": axes.get_xlim(),
        "y": axes.get_ylim(),
        "log": axes.get_yscale() == "log",
        "units": [text.partition(", ")[2] for text in (axes.get_xlabel(), figure.get_suptitle())],
        "series": {
            str(line.get_gid()).split("-")[1]: [
                [_short(x), _short(y)] for x, y in np.asarray(line.get_xydata()).tolist()
            ]
            for line in lines
        },
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
