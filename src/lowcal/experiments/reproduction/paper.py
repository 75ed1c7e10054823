"""The published figures, as package data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Published:
    """What the paper gives for one row: top-1 error in percent and speed-up as a ratio, None where it gives none."""

    top1_error: float | None = None
    speedup: float | None = None


@cache
def paper() -> dict[str, Any]:
    """The figures by table, as `paper.json` holds them."""
    text = (resources.files("lowcal.experiments.reproduction") / "paper.json").read_text("utf-8")
    return json.loads(text)


def published(table: str, recipe: str, strategy: str) -> Published:
    """The pair of figures that `table` gives for one strategy on one network and data set."""
    entry = paper()[table].get(recipe, {}).get(strategy)
    if isinstance(entry, dict):
        entry = entry["result"]
    if isinstance(entry, float):
        return Published(top1_error=entry)
    return Published(*entry) if entry else Published()
