"""Runs small enough to be repeated many times: 22 images of 6x6, three classes, a network with dropout."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.data import Augmentation, Batches, Images
from lowcal.data.mixing import Mixing
from lowcal.method_settings import LocalSettings, PruneSettings, ScheduleSettings, StochasticDepthSettings
from lowcal.methods import build_method, find_method
from lowcal.models import BasicBlock
from lowcal.norms import synchronise
from lowcal.training.batch_growth import BatchGrowth
from lowcal.training.distributed import TrainingGroup
from lowcal.training.run import Run, RunOptions
from lowcal.training.run_folder import RunFolder

MOVES = {1: 1, 3: 4}
OTHER_SETTINGS = {
    "stochastic_depth": StochasticDepthSettings(survival=0.4),
    "prune": PruneSettings(every=2, threshold=0.25),  # so high that channels go in this short time
}
TIMES = ("seconds", "total_seconds", "step_ms", "images_per_second")


def network() -> nn.Module:
    """Seven layers: a stem, two residual blocks, the second with a convolution in its shortcut, and a classifier."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(2, 4, 3, padding=1),
            one=BasicBlock(4, 4, stride=1),
            drop=nn.Dropout(0.3),
            two=BasicBlock(4, 6, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(6, 3),
        )
    )


def images(count: int, seed: int = 5) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 2, 6, 6), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(3, (count,), generator=generator))


def settings(moves: Mapping[int, int] | None = None, **values: Any) -> LocalSettings:
    """Settings of local learning with the boundary by hand, or with Algorithm 1 where `moves` is empty."""
    moves = MOVES if moves is None else dict(moves)
    schedule = ScheduleSettings(name="fixed", epochs=moves) if moves else ScheduleSettings(alpha=2.0, interval=1)
    return LocalSettings(schedule=schedule, **{"lr": 0.05, **values})


def make_run(
    path: Path,
    method: str = "local",
    *,
    seed: int = 0,
    epochs: int = 6,
    precision: str = "float32",
    local: LocalSettings | None = None,
    model: nn.Module | None = None,
    lr_at: Callable[[int], float] = lambda epoch: 0.1 * 0.7**epoch,
    fused: bool = False,
    growth: BatchGrowth | None = None,
    group: TrainingGroup | None = None,
    device: str = "cpu",
    images_count: int = 22,
    augment: bool = True,
    mixing: Mixing | None = None,
    **options: Any,
) -> Run:
    """A run in the folder `path`, which is made if it does not hold one yet; `options` are of `RunOptions`."""
    torch.manual_seed(seed)
    model = (network() if model is None else model).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01, fused=fused)
    group = group or TrainingGroup()
    statistics = {"mean": (0.5, 0.5), "std": (0.25, 0.25), "shard": group.shard, "device": device}
    train = Batches(
        images(images_count),
        batch=5,
        seed=seed,
        shuffle=True,
        augmentation=Augmentation(pad=1, flip=True) if augment else None,
        mixing=mixing,
        **statistics,
    )
    if RunFolder.holds_run(path) or not group.is_main:
        folder = RunFolder(path)
    else:
        identity = {
            "method": method,
            "recipe": "tiny",
            "seed": seed,
            "epochs": epochs,
            "model": "tiny",
            "dataset": "noise",
            "label": "tiny",
        }
        folder = RunFolder.create(path, recipe="name: tiny\n", environment={"device": "cpu"}, identity=identity)
    own = OTHER_SETTINGS.get(find_method(method).section, local or settings())
    example = train.sample_input(1)
    attached = build_method(method, model, optimizer, own, epochs=epochs, example_inputs=example, seed=seed)
    if group.world > 1:
        synchronise(model)
    test = Batches(images(13, seed=6), batch=8, **statistics)
    plan = RunOptions(epochs, lr_at, torch.device(device), precision=precision, seed=seed, **options)
    return Run(model, optimizer, attached, train, test, folder, plan, growth=growth, group=group)


def run_on(run: Run, epochs: int | None = None) -> Run:
    """Takes `run` on by so many epochs, or to its end."""
    for _ in range(run.epochs - run.finished if epochs is None else epochs):
        run.run_epoch()
    return run


def state(run: Run) -> dict[str, Any]:
    """All of a run that may not depend on how it came there."""
    return {
        "finished": run.finished,
        "model": {name: value.clone() for name, value in run.model.state_dict().items()},
        "learning": {name: value.requires_grad for name, value in run.model.named_parameters()},
        "optimizer": run.optimizer.state_dict(),
        "method": run.method.state_dict(),
        "batches": run.train.state_dict(),
        "log": log(run),
    }


def outcome(run: Run) -> dict[str, Any]:
    """The state of a run that may not depend on how its steps are run either."""
    records = [{k: v for k, v in record.items() if k != "step"} for record in log(run)]
    return {**state(run), "log": records}


def log(run: Run) -> list[dict[str, Any]]:
    """The run's records without the times in them."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in run.folder.read_epochs()]


def untimed(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary without its training time."""
    return {name: value for name, value in summary.items() if name != "seconds"}


def spoilt(*places: int, spoil: Callable[[Tensor], Any], training: bool = True) -> nn.Module:
    """A network whose scores `spoil` changes in the passes `places`, counted from 1, of training or of evaluation."""
    passes = itertools.count(1)

    def hook(model: nn.Module, inputs: Any, scores: Tensor) -> Tensor | None:
        # Tracing and dry runs are passes too, but without a graph or without data.
        if scores.is_meta or model.training != training or torch.is_grad_enabled() != training:
            return None
        return spoil(scores) if next(passes) in places else None

    torch.manual_seed(0)
    model = network()
    model.register_forward_hook(hook)
    return model
