"""Tables 6 and 7 and the frontier: methods at equal accuracy and at equal time, with SGD in less time as the rival."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowcal.experiments.reproduction.cells import Cell
from lowcal.experiments.reproduction.curves import (
    Curve,
    Point,
    curve,
    first_within,
    frontier,
    line_at,
    line_within,
    lowest,
    stopped_at,
)
from lowcal.experiments.reproduction.paper import paper
from lowcal.experiments.reproduction.plans import RESNET18_CIFAR10, Plan, short_step
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.rows import APART, Row, beside_paper, lines_apart, runs_of
from lowcal.report.table import Column

COMPRESSED = "sgd-compressed"  # with what the names of those cells begin
SHORT_STEP = short_step(RESNET18_CIFAR10).name

EQUAL_ACCURACY = (
    Column("strategy", "strategy"),
    *beside_paper("epochs", "epochs", "number"),
    *beside_paper("top1_error", "error, %", ".2f"),
    *beside_paper("speedup", "speed-up", ".2f", "×"),
    Column("state", "state"),
)
EQUAL_TIME = (
    Column("max_loss", "at most", ".2f"),
    *beside_paper("local_loss", "local", ".2f"),
    *beside_paper("freeze_loss", "freeze", ".2f"),
    Column("refresh_loss", "refresh", ".2f"),
    Column("short_step_loss", "short step", ".2f"),
    Column("stopped_loss", "sgd stopped", ".2f"),
    Column("compressed_loss", "compressed", ".2f"),
    Column("speedup", "speed-up", ".2f", "×"),
    Column("setting", "local's setting"),
    Column("state", "state"),
)


@dataclass(frozen=True)
class Curves:
    """The curves of one network's cells, by the cell's name, and SGD's line through its compressed runs."""

    by_name: Mapping[str, Curve]
    line: Curve

    @classmethod
    def of(cls, cells: Iterable[Cell], results: Results, seeds: int) -> Curves:
        """From the finished runs on the machine of SGD's; a cell without one is left out."""
        found = {cell.name: runs_of(cell, results, seeds) for cell in cells}
        if found.get("sgd"):
            machine = found["sgd"][0].machine
            found = {name: [run for run in runs if run.machine == machine] for name, runs in found.items()}
        by_name = {name: curve(runs) for name, runs in found.items() if runs}
        ends = [points[-1] for name, points in by_name.items() if name == "sgd" or name.startswith(COMPRESSED)]
        return cls(by_name, frontier(ends))

    def of_method(self, method: str) -> dict[str, Curve]:
        """The curves of a method's cells, all settings."""
        return {n: points for n, points in self.by_name.items() if n == method or n.startswith(f"{method}-")}


def equal_accuracy_rows(plan: Plan, results: Results, seeds: int) -> list[Row]:
    """Table 6: epochs and time until each first has the lowest error of local, and the speed-up over SGD stopped."""
    apart = lines_apart(plan, results, seeds)
    rows = []
    for recipe in dict.fromkeys(line.recipe for line in plan.lines):
        cells = [cell for cell in plan.cells if cell.recipe == recipe]
        names = [line.cell.name for line in apart if line.recipe == recipe]
        rows += _equal_accuracy(recipe, Curves.of(cells, results, seeds), names)
    return rows


def _equal_accuracy(recipe: str, curves: Curves, apart: Sequence[str]) -> list[Row]:
    local, plain = curves.by_name.get("local"), curves.by_name.get("sgd")
    target = lowest(local).error if local else None
    reached: dict[str, Point | None] = {}
    has_run = {"sgd": bool(plain), COMPRESSED: len(curves.line) > 1}
    for name in ("local", "freeze", "refresh"):
        has_run[name] = name in curves.by_name
    if target is not None:
        reached = {name: first_within(points, target) for name, points in curves.by_name.items()}
        reached[COMPRESSED] = line_within(curves.line, target) if has_run[COMPRESSED] else None
    words = {"sgd": "sgd, stopped early", COMPRESSED: "sgd, compressed", "refresh": "refresh (ours)"}
    against = reached.get("sgd")
    rows = []
    for name in ("sgd", COMPRESSED, "local", "freeze", "refresh"):
        point = reached.get(name)
        known = paper()["table6"][recipe].get(name)
        if target is None or not has_run[name]:
            state = "not run"
        elif point is None:
            state = "never as good"
        else:
            own = [other for other in apart if other == name or (name == COMPRESSED and other.startswith(name))]
            state = APART if own else ""
        rows.append(
            {
                "network": recipe,
                "strategy": words.get(name, name),
                "paper_epochs": known and known["epochs"],
                "epochs": point and point.epochs,
                "paper_top1_error": known and known["result"][0],
                "top1_error": point and point.error,
                "paper_speedup": known and known["result"][1],
                "speedup": against.seconds / point.seconds if against and point else None,
                "seconds": point and point.seconds,
                "state": state,
            }
        )
    return rows


def equal_time_rows(plan: Plan, results: Results, seeds: int) -> list[Row]:
    """Table 7: error above SGD's of local's fastest setting within a bound, and of its rivals in the same time."""
    curves = Curves.of(plan.cells, results, seeds)
    plain = curves.by_name.get("sgd")
    ends = {name: points[-1] for name, points in curves.of_method("local").items() if name != SHORT_STEP}
    apart = [line.cell.name for line in lines_apart(plan, results, seeds)]
    rows = []
    for known in paper()["table7"]:
        row: Row = {
            "network": RESNET18_CIFAR10,
            "max_loss": known["max_loss"],
            "paper_local_loss": known["local_loss"],
            "paper_freeze_loss": known["freeze_loss"],
        }
        if plain and ends:
            row |= _equal_time(plain, ends, known["max_loss"], curves)
            if not row["state"] and row["setting"] in apart:
                row["state"] = APART
        else:
            row["state"] = "not run"
        rows.append(row)
    return rows


def _equal_time(plain: Curve, ends: Mapping[str, Point], bound: float, curves: Curves) -> Row:
    base = plain[-1].error
    within = {name: end for name, end in ends.items() if end.error - base <= bound}
    if within:
        name = min(within, key=lambda name: within[name].seconds)
    else:
        name = min(ends, key=lambda name: (ends[name].error, ends[name].seconds))
    time = ends[name].seconds
    rivals: dict[str, Point | None] = {
        "stopped": stopped_at(plain, time),
        "compressed": line_at(curves.line, time) if len(curves.line) > 1 else None,
    }
    own = curves.by_name.get(SHORT_STEP)
    others = {method: curves.of_method(method).values() for method in ("freeze", "refresh")}
    for rival, found in {**others, "short_step": [own] if own else []}.items():
        in_time = [points[-1] for points in found if points[-1].seconds <= time]
        rivals[rival] = lowest(in_time) if in_time else None
    return {
        "local_loss": ends[name].error - base,
        **{f"{rival}_loss": point.error - base if point else None for rival, point in rivals.items()},
        "speedup": plain[-1].seconds / time,
        "seconds": time,
        "setting": name,
        "state": "" if within else "none within",
    }
