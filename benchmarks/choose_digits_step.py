"""Chooses the digits recipe's local step on a validation split; writes every figure to results/.

Run from the repository's root: python benchmarks/choose_digits_step.py
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, script
from lowcal.data import Dataset
from lowcal.experiments.assemble import build_run, load_data
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, as_dict, load_recipe
from lowcal.report.table import Column, Table, with_spread
from lowcal.training.environment import gather_environment

STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # the first is the published one (Sec. 6.1)
REFERENCES = ("sgd", "freeze")
RULE = (
    "the longest step whose mean top-1 error is at most one standard error above the lowest mean, "
    "so that the choice leaves the published step only as far as the figures ask for"
)


def last_epoch(recipe: Recipe, method: str, data: Dataset) -> dict[str, Any]:
    """The record of the last epoch of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(recipe, method=method, folder=Path(folder), data=data, device=torch.device("cpu"))
        while not run.done:
            record = run.run_epoch()
    return record


def measure(recipe: Recipe, method: str, seeds: int, data: Dataset) -> dict[str, Any]:
    """The errors of all seeds, their mean, deviation and standard error."""
    records = [last_epoch(replace(recipe, seed=seed), method, data) for seed in range(recipe.seed, recipe.seed + seeds)]
    errors = [record["top1_error"] for record in records]
    deviation = statistics.stdev(errors)
    return {
        "method": method,
        "lr": recipe.local.lr if method == "local" else None,
        "n": seeds,
        "top1_error": statistics.mean(errors),
        "top1_error_std": deviation,
        "standard_error": deviation / seeds**0.5,
        "top1_errors": errors,
        "boundaries": [record["boundary"] for record in records],
    }


def choose(rows: list[dict[str, Any]]) -> float:
    """The step that RULE picks."""
    best = min(rows, key=lambda row: row["top1_error"])
    limit = best["top1_error"] + best["standard_error"]
    return max(row["lr"] for row in rows if row["top1_error"] <= limit)


def main() -> None:
    """Measure, print, write."""
    parser = script(__doc__, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    recipe = apply_settings(load_recipe("digits"), ["data.evaluate=validation"])
    data = load_data(recipe, None)
    environment = gather_environment("cpu")
    rows = []
    for method, lr in [("local", lr) for lr in STEPS] + [(method, None) for method in REFERENCES]:
        own = recipe if lr is None else apply_settings(recipe, [f"local.lr={lr}"])
        rows.append(measure(own, method, arguments.seeds, data))
        print(rows[-1], flush=True)
    chosen = choose([row for row in rows if row["method"] == "local"])
    columns = (
        Column("method", "method"),
        Column("lr", "local step", "g"),
        Column("error", "top-1 error, %", lambda row: with_spread(row["top1_error"], row["top1_error_std"], row["n"])),
        Column("n", "seeds", "number"),
    )
    table = Table(columns, rows)
    print(table.text(), f"chosen: {chosen:g} = {RULE}", sep="\n\n")
    facts = {"recipe": as_dict(recipe), "validation_images": len(data.test), "rule": RULE, "chosen": chosen}
    table.write(arguments.out / "digits-local-step", ("json",), environment=environment, **facts)


if __name__ == "__main__":
    main()
