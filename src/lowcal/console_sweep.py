"""What `lowcal sweep` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowcal.console import table
from lowcal.report.sweep import sweep_cells

MOST_TRIALS = 20  # that are printed; all of them are in the files
WIDEST_REASON = 60


def sweep_text(summary: Mapping[str, Any]) -> str:
    """The table of a sweep's `sweep.json`, the best trials first unless it is a grid."""
    headings, lines = sweep_cells(summary)
    shown = lines if summary["sampler"] == "grid" else lines[:MOST_TRIALS]
    text = table(headings, [[*line[:-1], line[-1][:WIDEST_REASON]] for line in shown], left=(len(headings) - 1,))
    more = len(lines) - len(shown)
    return f"{text}\n... and {more} more" if more else text
