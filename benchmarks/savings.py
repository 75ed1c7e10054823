"""What local updates save beside freezing, in the paper and in measured steps: `savings.py FOLDER`.

A speed-up of s saves the part 1 - 1/s of the time. Reads the results of bench_networks.py in FOLDER, writes
FOLDER/savings.md. The largest boundary in each is 0.75 L, the cap of the published schedule.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lowcal.experiments.reproduce.paper import published

NETWORKS = {  # result -> recipe of the paper
    "resnet18-32": "resnet18-cifar10",
    "vgg13-32": "vgg13-cifar10",
    "resnet34-224": "resnet34-imagenet",
    "resnet50-224": "resnet50-imagenet",
    "mobilenet_v2-224": "mobilenet_v2-imagenet",
}


def saving(speedup: float) -> float:
    """The part of the time that a speed-up saves."""
    return 1.0 - 1.0 / speedup


def row(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The cells of one network; `rows` are those of its result."""
    paper = {method: published(NETWORKS[name], method)[1] for method in ("local", "freeze")}
    at = {(each["method"], each["boundary"]): each for each in rows}
    boundaries = sorted({boundary for _, boundary in at} - {0})
    whole = at["local", boundaries[-1]]

    def shares(method: str) -> str:
        found = [saving(at[method, each]["speedup"]) / saving(at["freeze", each]["speedup"]) for each in boundaries]
        return f"{min(found):.2f} to {max(found):.2f}"

    return [
        name,
        f"{paper['local']:.2f}×",
        f"{whole['ideal']:.2f}×",
        f"{whole['speedup']:.2f}×",
        f"{saving(paper['local']) / saving(paper['freeze']):.2f}",
        shares("local"),
        shares("local/4"),
    ]


def main(folder: Path) -> None:
    """Writes and prints the table."""
    lines = [
        "| network | `local`: paper | 0.75 L from the first epoch: by FLOPs | by step times "
        "| saving, local / freeze: paper | steps | steps, local/4 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in NETWORKS:
        cells = row(name, json.loads((folder / f"{name}.json").read_text())["rows"])
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "savings.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
