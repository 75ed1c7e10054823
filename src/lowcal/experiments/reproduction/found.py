"""What a search for a cell's settings has found, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowcal.experiments.recipe_files import show_value
from lowcal.experiments.search_space import parse_search
from lowcal.files import read_json


@dataclass(frozen=True)
class Found:
    """The settings that a finished search ends with.

    Attributes:
        settings: each as `key=value`.
        trial: the one that had them.
        trials: all of the search.
    """

    settings: tuple[str, ...]
    trial: int
    trials: int

    def __str__(self) -> str:
        return f"{', '.join(self.settings)}, trial {self.trial} of a search of {self.trials}"


def read_found(folder: Path, searches: Sequence[str], trials: int) -> Found | None:
    """What the sweep in `folder` found; None without one of these searches, so many trials and a result."""
    path = folder / "sweep.json"
    if not path.exists():
        return None
    summary = read_json(path)
    rows = summary["rows"]
    chosen = choose_trial(rows)
    if chosen is None or len(rows) < trials or summary["search"] != [str(parse_search(one)) for one in searches]:
        return None
    settings = tuple(f"{key}={show_value(value)}" for key, value in chosen["settings"].items())
    return Found(settings, chosen["trial"], len(rows))


def choose_trial(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of the trials whose error is no higher than the first one's, that with the fewest FLOPs; None without any result.

    The first trial has the common settings, so that what is found costs no accuracy against them. By error alone the
    search would end where nothing is local. FLOPs, other than times, are the same on every machine.
    """
    results = [row for row in rows if row["reason"] is None]
    if not results:
        return None
    first = next((row for row in results if row["trial"] == 0), None)
    most = first["top1_error"] if first else min(row["top1_error"] for row in results)
    within = [row for row in results if row["top1_error"] <= most]
    return min(within, key=lambda row: (row["flops"], row["top1_error"], row["trial"]))
