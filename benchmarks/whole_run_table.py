"""The table of all whole runs in a folder: `whole_run_table.py FOLDER` writes FOLDER/whole-runs.md."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = 2
ORDER = (  # the paper's
    "resnet18-cifar10",
    "vgg13-cifar10",
    "resnet34-imagenet",
    "resnet50-imagenet",
    "mobilenet_v2-imagenet",
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each network and method, in Markdown."""
    lines = [
        "| network, images | method | last boundary | paper | measured | predicted for its path | measured / predicted "
        "| published schedule at most: by step times | by FLOPs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        width = f" of width {result['width']}" if result["width"] else ""
        network = f"{result['model']}{width}, {result['images']} {result['image_size']}x{result['image_size']}"
        for row in result["rows"]:
            speedups = [f"{row[key]:.2f}×" for key in ("paper", "measured", "predicted")]
            most = [f"{row[key]:.2f}×" for key in ("most_by_steps", "most_by_flops")]
            where = f"{row['last_boundary']} of {result['layers']}"
            cells = [network, row["method"], where, *speedups, f"{row['ratio']:.3f}", *most]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path) -> str:
    """Writes the table of the results in `folder`, those of an older format left out; returns it."""
    results = [json.loads(file.read_text()) for file in folder.glob("whole-run-*.json")]
    results = sorted((r for r in results if r["format"] == FORMAT), key=lambda r: ORDER.index(r["recipe"]))
    (folder / "whole-runs.md").write_text(table(results))
    return table(results)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
