"""Bytes that a data-parallel step hands over for reduction, at each quarter of a network's layers.

Counted at the collectives themselves, not worked out from the layers. What one rank hands over does not depend on how
many ranks there are, so one process on the CPU is enough. Writes results/communication.json and .md.
"""

import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowcal
from common import BOUNDARY, RESULTS, write
from lowcal.models import build_model
from lowcal.report.table import Column, Table
from lowcal.training.environment import gather_environment

MODELS = {"resnet18": (10, 32), "resnet50": (1000, 64)}  # classes, image size
RULES = {
    "local": lowcal.Hebbian(),
    "local/4": lowcal.Hebbian(every=4),
    "freeze": lowcal.Frozen(),
    "refresh/4": lowcal.Refresh(every=4),
}


class Collectives(TorchDispatchMode):
    """Counts the bytes of the tensors handed to each of torch's collectives while it is entered, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            handed = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.bytes[func.overloadpacket.__name__] += handed
        return func(*args, **(kwargs or {}))


def counted(name: str, rule: lowcal.Hebbian | lowcal.Frozen) -> list[dict[str, Any]]:
    """A row for each boundary: what a step hands over on average over the rule's period, counted and foretold."""
    classes, size = MODELS[name]
    torch.manual_seed(0)
    model = build_model(name, classes=classes)
    images = torch.randn(2, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    local = lowcal.LoCal(model, optimizer, epochs=1, rule=rule, example_inputs=images)
    parallel = lowcal.DistributedLoCal(model, local)
    depth, rows = len(local.layers), []
    for boundary in (0, depth // 4, depth // 2, 3 * depth // 4):
        local.move_to(boundary)
        with Collectives() as collectives:
            for _ in range(rule.every):
                loss = nn.functional.cross_entropy(parallel(images), torch.zeros(2, dtype=torch.int64))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        rows.append(
            {
                "model": name,
                "boundary": boundary,
                "layers": depth,
                "reduced_bytes": collectives.bytes["allreduce_"] / rule.every,
                "bytes_per_step": parallel.bytes_per_step(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the counted bytes in MiB: a row for each boundary, a column for each method."""
    places: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        place = places.setdefault((row["model"], row["boundary"]), dict(row))
        place[row["method"]] = row["reduced_bytes"]
    return Table(
        (Column("model", "network"), BOUNDARY, *(Column(method, method, ".2f", scale=2**20) for method in RULES)),
        list(places.values()),
    )


def main() -> None:
    """Counts for all networks and methods, prints the table and writes it beside the figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/group", rank=0, world_size=1)
        rows = [
            {"method": method, **row}
            for name in MODELS
            for method, rule in RULES.items()
            for row in counted(name, rule)
        ]
        dist.destroy_process_group()
    write(RESULTS / "communication", table(rows), rows=rows, environment=gather_environment("cpu"))


if __name__ == "__main__":
    main()
