"""Steps with and without `save_drop_path` in turn, on one CPU thread; needs timm. Writes results/drop-path.*."""

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from common import RESULTS, quartiles, write
from lowcal import save_drop_path
from lowcal.experiments.bench.timing import Work, time_in_turn
from lowcal.report.table import Column, Table
from lowcal.training.environment import gather_environment

CPU, BATCH, PIXELS, ROUNDS = torch.device("cpu"), 32, 64, 30
VIT = {"img_size": PIXELS, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
NETWORKS = {
    "ViT, 6 blocks, width 192": lambda: VisionTransformer(**VIT),
    "ConvNeXt, 6 blocks, widths 96 and 192": lambda: ConvNeXt(
        [CNBlockConfig(96, 192, 3), CNBlockConfig(192, None, 3)], num_classes=10
    ),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    """Train on a mini-batch."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), torch.zeros(BATCH, dtype=torch.int64)).backward()
    optimizer.step()


def measure(name: str, rate: float) -> dict[str, Any]:
    """Return a row: the times of both steps, and the ratio of their FLOPs, with the same rate in all blocks."""
    torch.manual_seed(0)
    images, runs, flops = torch.randn(BATCH, 3, PIXELS, PIXELS), {}, {}
    for kind in ("own_ms", "step_ms"):
        model = NETWORKS[name]().train()
        for module in list(model.modules()):
            for child in ("drop_path1", "drop_path2", "stochastic_depth"):
                if hasattr(module, child):
                    setattr(module, child, DropPath(rate))
        if kind == "step_ms":
            save_drop_path(model)
        runs[kind] = partial(step, model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), images)
        with FlopCounterMode(display=False) as counter:
            for _ in range(10):
                runs[kind]()
        flops[kind] = counter.get_total_flops()
    timings = time_in_turn({kind: Work(run) for kind, run in runs.items()}, rounds=ROUNDS, warm_up=4, device=CPU)
    row = {"network": name, "rate": rate, "rounds": ROUNDS, "flops_ratio": flops["step_ms"] / flops["own_ms"]}
    for kind, timing in timings.items():
        row |= timing.fields(kind)
    return row | {"ratio": row["step_ms"] / row["own_ms"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    environment = gather_environment("cpu")
    columns = (
        Column("network", "network"), Column("rate", "rate", ".1f"),
        Column("own_ms", "own drop path, ms (quartiles)", lambda row: quartiles(row, "own_ms")),
        Column("step_ms", "saved, ms (quartiles)", quartiles),
        Column("ratio", "time, ratio", ".2f"), Column("flops_ratio", "1 - saved work", ".2f"),
    )  # fmt: skip
    rows = [measure(name, rate) for name in NETWORKS for rate in (0.1, 0.3, 0.5)]
    write(RESULTS / "drop-path", Table(columns, rows), environment=environment, batch=BATCH, image_size=PIXELS)
