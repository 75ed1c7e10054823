"""What local updates save beside freezing, in the paper and in measured steps: `savings.py FOLDER`.

A speed-up of s saves the part 1 - 1/s of the time. Reads the step times of performance.py in FOLDER, writes
FOLDER/savings.md. The largest boundary in each is 0.75 L, the cap of the published schedule.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lowcal.experiments.reproduce.paper import published
from lowcal.report.table import Column, Table

NETWORKS = {  # result -> recipe of the paper
    "resnet18-32": "resnet18-cifar10",
    "vgg13-32": "vgg13-cifar10",
    "resnet34-224": "resnet34-imagenet",
    "resnet50-224": "resnet50-imagenet",
    "mobilenet_v2-224": "mobilenet_v2-imagenet",
}


def saving(speedup: float) -> float:
    """Return the part of the time that a speed-up saves."""
    return 1.0 - 1.0 / speedup


def row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one network; `rows` are those of its result."""
    paper = {method: published(NETWORKS[name], method)[1] for method in ("local", "freeze")}
    at = {(each["method"], each["boundary"]): each for each in rows}
    boundaries = sorted({boundary for _, boundary in at} - {0})
    whole = at["local", boundaries[-1]]

    def shares(method: str) -> str:
        found = [saving(at[method, each]["speedup"]) / saving(at["freeze", each]["speedup"]) for each in boundaries]
        return f"{min(found):.2f} to {max(found):.2f}"

    return {
        "network": name,
        "paper": paper["local"],
        "ideal": whole["ideal"],
        "speedup": whole["speedup"],
        "paper_share": saving(paper["local"]) / saving(paper["freeze"]),
        "steps": shares("local"),
        "steps_4": shares("local/4"),
    }


def main(folder: Path) -> None:
    """Write and print the table."""
    columns = (
        Column("network", "network"),
        Column("paper", "`local`: paper", ".2f", "×"),
        Column("ideal", "0.75 L from the first epoch: by FLOPs", ".2f", "×"),
        Column("speedup", "by step times", ".2f", "×"),
        Column("paper_share", "saving, local / freeze: paper", ".2f"),
        Column("steps", "steps", lambda row: row["steps"]),
        Column("steps_4", "steps, local/4", lambda row: row["steps_4"]),
    )
    rows = [row(name, json.loads((folder / f"{name}.json").read_text())["rows"]) for name in NETWORKS]
    table = Table(columns, rows)
    table.write(folder / "savings", ("md",))
    print(table.markdown())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
