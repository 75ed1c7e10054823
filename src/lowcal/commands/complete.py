"""What the shell completes: names of recipes, methods and networks. Torch is not loaded, which takes seconds."""

from __future__ import annotations

import importlib.util
import re
from importlib import resources
from pathlib import Path

OWN_MODELS = ("resnet8", "resnet18", "vgg13")


def recipes(incomplete: str) -> list[str]:
    """Complete the name of a packaged recipe."""
    folder = resources.files("lowcal.experiments") / "recipes"
    names = (entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name for name in names if name.startswith(incomplete))


def methods(incomplete: str) -> list[str]:
    """Complete the last of several methods, which are separated by commas."""
    from lowcal.report.runs import METHODS

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in METHODS if name.startswith(last)]


def models(incomplete: str) -> list[str]:
    """Complete the name of a network: ours, and torchvision's, which are read from its source."""
    names = set(OWN_MODELS)
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is not None and torchvision.origin is not None:
        for file in (Path(torchvision.origin).parent / "models").glob("*.py"):
            names |= set(re.findall(r"^@register_model\(.*\)\n(?:@.*\n)*def (\w+)", file.read_text("utf-8"), re.M))
    return sorted(name for name in names if name.startswith(incomplete))
