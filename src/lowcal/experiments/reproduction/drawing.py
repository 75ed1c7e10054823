"""The pictures of a table or figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from lowcal.experiments.reproduction.plans import Plan, make_plan, plan_names, sgd
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.rivals import Curves
from lowcal.experiments.reproduction.rows import is_apart, runs_of
from lowcal.report import figures
from lowcal.report.frontier import Spot, frontier
from lowcal.report.runs import RunData

SEVERAL = ("figure5", "figure6", "table6", "table7")  # that compare settings, in the plane of error and time


def draw(plan: Plan, results: Results, seeds: int) -> dict[str, Figure]:
    """The plan's pictures by name, without those that no run is finished for."""
    if plan.kind == "boundary":
        return _epochs(plan, results, seeds, figures.boundary, "boundary", by_network=True)
    if plan.kind == "memory":
        memory = _epochs(plan, results, seeds, figures.peak_memory, "memory", by_network=False)
        return memory | _epochs(plan, results, seeds, figures.batch, "batch", by_network=False)
    if plan.name not in SEVERAL:
        return {}
    recipes = dict.fromkeys(line.recipe for line in plan.lines)
    pictures = {f"frontier-{recipe}": draw_frontier(recipe, results, seeds) for recipe in recipes}
    return {name: picture for name, picture in pictures.items() if picture}


def draw_frontier(recipe: str, results: Results, seeds: int) -> Figure | None:
    """Error against time of all cells of `recipe` that are finished, whichever table they are of; None for none."""
    plans = [make_plan(name, results.base) for name in plan_names()]
    cells = dict.fromkeys(cell for plan in plans for cell in plan.cells if cell.recipe == recipe)
    same_data = [cell for cell in cells if not cell.variant.startswith("batch-")]
    curves = Curves.of(same_data, results, seeds)
    spots: dict[str, list[Spot]] = {}
    for cell in same_data:
        points = curves.by_name.get(cell.name)
        if points and not cell.variant.startswith("compressed"):
            apart = is_apart(cell, sgd(recipe), results, seeds)
            spots.setdefault(cell.method, []).append(Spot(points[-1].seconds, points[-1].error, cell.variant, apart))
    if not spots:
        return None
    line = [(point.seconds, point.error) for point in curves.line]
    return frontier(line, spots, title=_title(f"{recipe}: error against time", results, [recipe]))


def _epochs(
    plan: Plan,
    results: Results,
    seeds: int,
    make: Callable[[Sequence[RunData]], Figure],
    name: str,
    *,
    by_network: bool,
) -> dict[str, Figure]:
    """A picture over the epochs, with a line for each network or for each of the plan's lines."""
    runs = []
    for line in plan.lines:
        label = line.recipe.partition("-")[0] if by_network else line.strategy
        runs += [replace(run, method=label) for run in runs_of(line.cell, results, seeds)]
    if not runs:
        return {}
    figure = make(runs)
    with figures.style():
        text = "Boundary, in layers" if by_network else figure.get_suptitle()  # networks differ in their layers
        title = _title(text, results, [line.recipe for line in plan.lines])
        figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold")
    return {name: figure}


def _title(text: str, results: Results, recipes: Sequence[str]) -> str:
    marks = results.marks(recipes)
    return f"{text}\n({marks})" if marks else text
