"""At which boundary a batch doubles: the counted peak of a step, that of twice the images, and what is predicted of it.

Nothing is trained: a step's bytes are counted in runs without data, as `lowcal train` does on a CPU. Writes
results/growing-batch.json and .md.
"""

from typing import Any

import torch
from torch import nn

from common import BOUNDARY, METHOD, RESULTS, write
from lowcal.method_settings import LocalSettings
from lowcal.methods import build_method
from lowcal.models import build_model
from lowcal.report.table import Column, Table
from lowcal.training.batch_growth import next_batch, predicted_peak
from lowcal.training.cost import dry_cost, held_bytes
from lowcal.training.environment import gather_environment

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


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a row for each network and method."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["method"]), []).append(row)
    lines = []
    for found in groups.values():
        ratios = [row["predicted_bytes"] / row["doubled_peak_bytes"] for row in found]
        line = found[0] | {"last": found[-1]["peak_bytes"] / found[0]["peak_bytes"]}
        line["doubles"] = next((BOUNDARY.cell(row) for row in found if row["doubles"]), "never")
        lines.append(line | {"ratios": f"{min(ratios):.3f} to {max(ratios):.3f}"})
    columns = (
        Column("network", "network"),
        METHOD,
        Column("peak_bytes", "peak of SGD", ".0f", " MiB", scale=2**20),
        Column("last", "peak at 0.75 of the layers", ".2f"),
        Column("doubles", "doubles from", lambda row: row["doubles"]),
        Column("ratios", "predicted / counted", lambda row: row["ratios"]),
    )
    return Table(columns, lines)


def main() -> None:
    """Counts for all networks and methods, prints the table and writes it beside the figures."""
    rows = [row for name in MODELS for method in ("local", "freeze") for row in counted(name, method)]
    write(RESULTS / "growing-batch", table(rows), rows=rows, environment=gather_environment("cpu"))


if __name__ == "__main__":
    main()
