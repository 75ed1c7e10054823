"""Budgets of time and of memory: asked and measured, on ResNet18 and EfficientNet-Lite0.

    python benchmarks/budget.py

Trains sgd and freeze in turn, epoch by epoch, on synthetic images with one CPU thread. The speed-up is the time of sgd
over that of freeze with the same seed. Peak memory is that of a training step, over the one of sgd, in one epoch. About
half an hour on a quiet machine. Writes OUT/budget.json and .md.
"""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common import RESULTS, Log, script, write
from lowcal.commands.common import budget_settings
from lowcal.experiments.compare import compare
from lowcal.experiments.recipe_text import apply_settings, load_recipe
from lowcal.report.table import Column, Table
from lowcal.training.environment import gather_environment
from lowcal.training.process import keep_freed_memory
from lowcal.training.run_folder import RunFolder

COMMON = ["step=eager", "threads=1", "local.norm_stats=running", "data.test_images=16", "data.classes=10"]
NETWORKS = {
    "resnet18, 32x32": ("resnet18-cifar10", ["model.width=32", "batch=32", "data.image_size=32"]),
    "efficientnet_lite0, 96x96": ("finetune", ["model.weights=null", "model.frozen=null", "batch=16"]),
}


def row(network: str, budget: str, epochs: int, steps: int, seeds: int) -> dict[str, Any]:
    """A row: what was asked, and what was measured with each seed."""
    name, own = NETWORKS[network]
    settings = ["data.name=synthetic", *COMMON, *own, f"epochs={epochs}", *budget_settings(budget)]
    recipe = apply_settings(load_recipe(name), settings)
    recipe = apply_settings(recipe, [f"data.train_images={steps * recipe.batch.size}"])
    with TemporaryDirectory() as folder:
        out = Path(folder) / "runs"
        compare(recipe, ["sgd", "freeze"], seeds, out, data_dir=None, device=torch.device("cpu"), watcher=Log())
        files = {name: [RunFolder(out / f"{name}-seed{seed}") for seed in range(seeds)] for name in ("sgd", "freeze")}
        sgd, freeze = ([file.read_summary() or {} for file in files[name]] for name in files)
        paths = [[record["boundary"] for record in file.read_epochs()] for file in files["freeze"]]
    key = "seconds" if budget.endswith("x") else "peak_memory_bytes"
    parts = [other[key] / one[key] for one, other in zip(sgd, freeze, strict=True)]
    measured = [1 / part for part in parts] if budget.endswith("x") else parts
    quotients = [value / float(budget.removesuffix("x").removesuffix("memory")) for value in measured]
    facts = {"network": network, "asked": budget, "n": seeds, "epochs": epochs, "steps": steps, "boundaries": paths}
    found = {"quotient": statistics.mean(quotients), "least": min(quotients), "most": max(quotients)}
    return {**facts, **found, "measured": measured, "layers": freeze[0]["layers"]}


def main() -> None:
    """Train, print, write."""
    parser = script(__doc__, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="in an epoch")
    parser.add_argument("--speedups", nargs="+", default=["1.25x", "1.5x"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the command does
    sizes = arguments.epochs, arguments.steps, arguments.seeds
    rows = [row(network, budget, *sizes) for network in NETWORKS for budget in arguments.speedups]
    rows += [row(network, "0.5 memory", 1, 1, 1) for network in NETWORKS]
    columns = (
        Column("network", "network"),
        Column("asked", "asked"),
        Column("measured", "measured", lambda row: ", ".join(f"{value:.2f}" for value in row["measured"])),
        Column("quotient", "measured / asked", ".3f"),
        Column("spread", "lowest, highest", lambda row: f"{row['least']:.3f}, {row['most']:.3f}"),
        Column("n", "n"),
    )
    write(arguments.out / "budget", Table(columns, rows), environment=gather_environment("cpu"))


if __name__ == "__main__":
    main()
