"""Whole runs beside what their boundary's path predicts: `whole_run.py --data-dir DIR --out FOLDER`.

Trains sgd, local and freeze in turn by the published recipe, shortened; then times a step at each boundary that the
runs were at, in turn too. A run's speed-up over sgd is compared with the one that those step times give for its path.
Writes FOLDER/NAME.json and FOLDER/NAME.md; about ten minutes on two quiet cores.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from lowcal.console_bench import table
from lowcal.experiments.assemble import find_device
from lowcal.experiments.bench import BenchResult, bench
from lowcal.experiments.bench_settings import BenchSettings
from lowcal.experiments.compare import compare
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_files import apply_settings, load_recipe
from lowcal.training.allocator import keep_freed_memory
from lowcal.training.environment import gather_environment

METHODS = ("local", "freeze")
SHORTER = ("epochs=18", "lr_schedule.epochs=90", "data.train_images=2048", "data.test_images=256")
LEAST = 0.98  # measured over predicted speed-up


class Quiet:
    """Says what runs are begun, and nothing of their steps."""

    def note(self, text: str) -> None:
        """Prints `text`."""
        print(text, flush=True)

    def begin(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def step(self, *_: Any) -> None:
        """Nothing."""

    def epoch(self, arm: Any, record: Any) -> None:
        """Prints an epoch's time."""
        print(arm.folder, record["epoch"], record["boundary"], f"{record['seconds']:.2f} s", flush=True)


def logs(folder: Path, method: str) -> list[dict[str, Any]]:
    """The epochs of a run."""
    lines = (folder / f"{method}-seed0" / "epochs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def step_times(recipe: Recipe, boundaries: set[int], layers: int, device: torch.device) -> BenchResult:
    """A step of each method at each of `boundaries`."""
    settings = BenchSettings(
        recipe.model.name,
        batch=recipe.batch.size,
        image_size=32,
        width=recipe.model.width,
        precision=recipe.precision,
        channels_last=recipe.channels_last,
        boundaries=tuple(boundary / layers for boundary in sorted(boundaries - {0})),
        every=1,
        rounds=15,
        layers=False,
    )
    return bench(settings, device, print)


def main() -> None:
    """Trains, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="resnet18-cifar10")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="a setting beside those that shorten the run")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    device = find_device(arguments.device)
    recipe = apply_settings(load_recipe(arguments.recipe), [*SHORTER, *arguments.set])
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "runs"
        compare(recipe, ("sgd", *METHODS), 1, out, data_dir=arguments.data_dir, device=device, watcher=Quiet())
        runs = {method: logs(out, method) for method in ("sgd", *METHODS)}
    boundaries = {record["boundary"] for records in runs.values() for record in records}
    layers = runs["sgd"][0]["layers"]
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    times = step_times(recipe, boundaries, layers, device)
    step_ms = {(row.method, row.boundary): row.step_ms for row in times.rows}
    seconds = {method: sum(record["seconds"] for record in records) for method, records in runs.items()}
    rows = []
    for method in METHODS:
        path = [record["boundary"] for record in runs[method]]
        predicted = len(path) * step_ms["sgd", 0]
        predicted /= sum(step_ms[method if boundary else "local", boundary] for boundary in path)
        measured = seconds["sgd"] / seconds[method]
        rows.append(
            {
                "method": method,
                "boundaries": path,
                "measured": measured,
                "predicted": predicted,
                "ratio": measured / predicted,
            }
        )
    result = {
        "format": 1,
        "recipe": recipe.name,
        "settings": [*SHORTER, *arguments.set],
        "epochs": recipe.epochs,
        "steps": runs["sgd"][0]["steps"],
        "layers": layers,
        "rows": rows,
        "step_times": [{"method": m, "boundary": b, "step_ms": ms} for (m, b), ms in step_ms.items()],
        "environment": gather_environment(str(device)),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"whole-run-{recipe.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(
        table(
            ("method", "measured", "predicted", "ratio", f">= {LEAST}"),
            [
                (
                    row["method"],
                    f"{row['measured']:.3f}x",
                    f"{row['predicted']:.3f}x",
                    f"{row['ratio']:.3f}",
                    "met" if row["ratio"] >= LEAST else "missed",
                )
                for row in rows
            ],
            left=(0, 4),
        )
    )


def markdown(result: dict[str, Any]) -> str:
    """The table for the documentation."""
    lines = [
        "| method | last boundary | measured speed-up | predicted | measured / predicted |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        where = f"{row['boundaries'][-1]} of {result['layers']}"
        lines.append(
            f"| {row['method']} | {where} | {row['measured']:.2f}× | {row['predicted']:.2f}× | {row['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
