"""The picture of a measured network: step time against boundary, beside the limit and the FLOP ideal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lowcal.report.figures import INK, colours, save, style


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws a bench's JSON to `path`, an .svg or .png."""
    rows = result["rows"]
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if "/" not in method]
    sgd = rows[0]
    with style():
        figure = Figure()
        axes = figure.add_subplot()
        figure.suptitle("Time of a training step, ms", x=0.015, ha="left", fontsize=14, fontweight="bold")
        axes.axhline(result["plain_step_ms"], color=INK, linewidth=1, label="plain loop")
        for method, (colour, _dark) in colours(methods).items():
            if method == "sgd":
                continue
            chosen = sorted(
                (row for row in rows if row["method"] == method or row is sgd), key=lambda row: row["boundary"]
            )
            at = [row["boundary"] for row in chosen]
            middle = [row["step_ms"] for row in chosen]
            reach = [
                [row["step_ms"] - row["step_ms_q25"] for row in chosen],
                [row["step_ms_q75"] - row["step_ms"] for row in chosen],
            ]
            axes.errorbar(at, middle, reach, color=colour, marker="o", markersize=4, capsize=3, label=method)
            limits = [row["limit_ms"] for row in chosen]
            axes.plot(at, limits, color=colour, linestyle="--", linewidth=1.2, label="its limit")
            ideals = [sgd["step_ms"] / row["ideal"] for row in chosen]
            axes.plot(at, ideals, color=colour, linestyle=":", linewidth=1.2, label="its FLOP ideal")
        axes.set_ylim(0, None)
        axes.set_xlabel(f"boundary, of {result['layers']} layers of {result['model']}")
        axes.legend(fontsize=9)
    save(figure, path)
