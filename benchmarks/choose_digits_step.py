"""Chooses the digits recipe's local step on a validation split; writes every figure to results/.

Run from the repository's root: python benchmarks/choose_digits_step.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowcal.data import Dataset
from lowcal.experiments.assemble import build_run, load_data
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, as_dict, load_recipe
from lowcal.files import write_json
from lowcal.report.table import with_spread
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/digits-local-step.json"))
    arguments = parser.parse_args()
    recipe = apply_settings(load_recipe("digits"), ["data.evaluate=validation"])
    data = load_data(recipe, None)
    environment = gather_environment("cpu")
    rows = []
    print(f"digits, validation split: {len(data.train)} images to train on, {len(data.test)} to validate on")
    for method, lr in [("local", lr) for lr in STEPS] + [(method, None) for method in REFERENCES]:
        own = recipe if lr is None else apply_settings(recipe, [f"local.lr={lr}"])
        row = measure(own, method, arguments.seeds, data)
        rows.append(row)
        error = with_spread(row["top1_error"], row["top1_error_std"], row["n"])
        print(
            f"{method:6}  {'' if lr is None else lr:<7}  {error} %  ({row['n']} seeds)",
            flush=True,
        )
    chosen = choose([row for row in rows if row["method"] == "local"])
    print(f"chosen: {chosen:g} = {RULE}")
    recorded = {"recipe": as_dict(recipe), "validation_images": len(data.test), "rule": RULE, "chosen": chosen}
    write_json(arguments.out, {"format": 1, "environment": environment, **recorded, "rows": rows})


if __name__ == "__main__":
    main()
