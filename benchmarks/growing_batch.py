"""At which boundary a batch doubles: the counted peak of a step, that of twice the images, and what is predicted of it.

Nothing is trained: a step's bytes are counted in runs without data, as `lowcal train` does on a CPU. Writes
results/growing-batch.json and .md.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowcal.files import write_json
from lowcal.method_settings import LocalSettings
from lowcal.methods import build_method
from lowcal.models import build_model
from lowcal.training.cost import dry_cost, held_bytes
from lowcal.training.environment import gather_environment
from lowcal.training.growth import next_batch, predicted_peak

RESULT = Path(__file__).parents[1] / "results" / "growing-batch.json"
MODELS = {"resnet18": (10, 32), "vgg13": (10, 32), "resnet50": (1000, 224), "mobilenet_v2": (1000, 224)}
BATCH = 64  # images, the paper's for one GPU
EPOCHS = 90
STEPS = 8  # boundaries from none to three quarters of the layers, evenly


def counted(name: str, method: str) -> list[dict[str, Any]]:
    """A row for each boundary; `doubles` says whether twice the images take no more than SGD's step."""
    classes, size = MODELS[name]
    torch.manual_seed(0)
    model = build_model(name, classes=classes)
    images = torch.randn(2, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    attached = build_method(method, model, optimizer, LocalSettings(), epochs=EPOCHS, example_inputs=images, seed=0)
    nn.functional.cross_entropy(model(images), torch.zeros(2, dtype=torch.int64)).backward()
    optimizer.step()  # makes the momentum
    optimizer.zero_grad()
    layers, rows = len(attached.layers), []
    for boundary in sorted({round(0.75 * layers * step / STEPS) for step in range(STEPS + 1)}):
        attached.move_to(boundary)
        peak, doubled = (dry_cost(attached, (count, 3, size, size)).peak_bytes for count in (BATCH, 2 * BATCH))
        held, limit = held_bytes(model, optimizer, gradients=False), rows[0]["peak_bytes"] if rows else peak
        batch = next_batch(BATCH, peak=peak, held=held, limit=limit, most=2 * BATCH)
        own = {"network": name, "method": method, "image_size": size, "batch": BATCH, "boundary": boundary}
        own |= {"layers": layers, "peak_bytes": peak, "held_bytes": held, "doubled_peak_bytes": doubled}
        rows.append(own | {"predicted_bytes": predicted_peak(peak, held), "doubles": batch > BATCH})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each network and method, in Markdown."""
    lines = ["| network | method | peak of SGD | peak at 0.75 of the layers | doubles from | predicted / counted |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["method"]), []).append(row)
    for (network, method), found in groups.items():
        first, last = found[0]["peak_bytes"], found[-1]["peak_bytes"]
        ratios = [row["predicted_bytes"] / row["doubled_peak_bytes"] for row in found]
        place = next((f"{row['boundary']} of {row['layers']}" for row in found if row["doubles"]), "never")
        cells = (network, method, f"{first / 2**20:.0f} MiB", f"{last / first:.2f}", place)
        lines.append(f"| {' | '.join(cells)} | {min(ratios):.3f} to {max(ratios):.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Counts for all networks and methods, prints the table and writes it beside the figures."""
    rows = [row for name in MODELS for method in ("local", "freeze") for row in counted(name, method)]
    print(table(rows))
    write_json(RESULT, {"format": 1, "environment": gather_environment("cpu"), "rows": rows})
    RESULT.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
