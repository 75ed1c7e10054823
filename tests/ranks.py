"""Two ranks on this machine, and a small network whose samples do not see each other, so that they can be split up."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.training.distributed import TrainingGroup

from .world import together

BATCH = 8

_script = Path(__file__).parents[1] / "benchmarks" / "communication.py"
_spec = importlib.util.spec_from_file_location("lowcal_communication", _script)
communication = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(communication)
Collectives = communication.Collectives


def network() -> nn.Sequential:
    """Three convolutions and a classifier, for (N, 3, 8, 8); the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def data(seed: int) -> tuple[Tensor, Tensor]:
    """A mini-batch for `network`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator)


def on_two_ranks(train: Callable[..., Any], *arguments: Any, cuda: bool = False) -> list[Any]:
    """What `train(rank, *arguments)` gives on each of two ranks of one process group, on a GPU each if `cuda`."""
    with tempfile.TemporaryDirectory() as folder:
        together(2, _keep, train, folder, arguments, cuda=cuda)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in (0, 1)]


def _keep(ranks: TrainingGroup, train: Callable[..., Any], folder: str, arguments: Any) -> None:
    torch.save(train(ranks.rank, *arguments), f"{folder}/{ranks.rank}.pt")
