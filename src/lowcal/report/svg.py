"""Figures as markup inside a page, following the page's text colour, font and dark mode."""

import html
import io
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from lowcal.report.figures import INK, NO_METADATA, style

__all__ = ["inline_svg"]

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
