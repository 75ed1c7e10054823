"""Recipes: every setting of a run in one frozen, checked object.

A recipe is a YAML file. Those of the package lie in `recipes/`; a user's own is given by its path.
`--set a.b=value` changes single settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lowcal.errors import LowcalError
from lowcal.method_settings import LocalSettings, PruneSettings, StochasticDepthSettings
from lowcal.settings import Count, Fraction, Limits, NonNegative, Positive, Settings, Whole, Written

Name = Annotated[str, Limits(least=1, unit=" character")]


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The network; `width` is the channels of the first stage (None: the network's own).

    `weights` are loaded before training: a file (safetensors or a state_dict), "imagenet", or the name of torchvision's
    weights; the classifier may have other classes. `frozen` is the boundary from the first step on, in methods with a
    boundary: a number of layers, a fraction of them, or the name of a layer or of a part with layers, the last one.
    """

    name: Name
    width: Count | None = None
    weights: Name | None = None
    frozen: Whole | Annotated[float, Limits(above=0, below=1)] | Name | None = None


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """The images; `evaluate="validation"` holds out a part of the training images and evaluates on it.

    `workers` processes decode imagenet's files and augment beyond a crop and a flip (None: one per processor, 16 at
    most); their number changes no image. `seed` decides subsets and splits, so that runs with different seeds see the
    same images. `channels=3` repeats grey images, for networks that take colour.

    `augment` crops and flips training images at random. "randaugment" also applies `ra_ops` random operations of
    strength `ra_magnitude` (torchvision's RandAugment), "trivial" one of random strength (TrivialAugmentWide).
    `random_erase` is the probability that a rectangle is erased. `mixup` and `cutmix` mix images in pairs: each is the
    alpha of a Beta distribution, 0: off; with both, each image gets one of them.
    """

    name: (
        Literal["digits", "cifar10", "cifar100", "image-folder", "imagenet", "synthetic"]
        | Annotated[str, Written(r".+\.py:\w+", "my_data.py:load")]
    )
    seed: Whole = 0
    train_images: Count | None = None
    test_images: Count | None = None
    image_size: Count | None = None
    channels: Annotated[int, Limits(least=3, most=3)] | None = None
    augment: bool | Literal["randaugment", "trivial"] = True
    ra_ops: Count = 2
    ra_magnitude: Annotated[int, Limits(least=0, most=30)] = 9
    random_erase: Annotated[float, Limits(least=0, most=1)] = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    classes: Annotated[int, Limits(least=2)] | None = None
    evaluate: Literal["test", "validation"] = "test"
    validation_fraction: Annotated[float, Limits(above=0, below=1)] = 0.2
    on_error: Literal["stop", "skip"] = "stop"
    download: bool = True
    workers: Whole | None = None

    @property
    def augments_in_workers(self) -> bool:
        """Whether training images are changed in ways that worker processes do."""
        return isinstance(self.augment, str) or self.random_erase > 0


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Images in a mini-batch; with `grow` their number doubles when a move of the boundary has freed enough memory.

    `memory_limit` is the bytes that a training step may take, or text such as 8GiB (None: those of a step in the first
    epoch). With `scale_lr` SGD's learning rate grows with the batch.
    """

    short: ClassVar[str] = "size"  # the setting that a plain value instead of the section sets

    size: Count
    grow: bool = False
    memory_limit: Count | None = None
    scale_lr: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.memory_limit, str):
            object.__setattr__(self, "memory_limit", _in_bytes("batch.memory_limit", self.memory_limit))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Settings):
    """Whether methods with frozen layers compute them once for each image, and `where` the results are stored.

    It needs images that are the same in each epoch (data.augment=false), or `views`: so many epochs at each boundary
    have augmented images of their own, which are stored, and later epochs use them again in turn. `limit` is the most
    bytes, or text such as 8GiB (None: those that are free). `half` stores single precision in half of the bytes,
    rounded.
    """

    short: ClassVar[str] = "where"

    where: Literal["none", "memory", "disk"] = "none"
    limit: Count | None = None
    half: bool = False
    views: Count | None = None

    def __post_init__(self) -> None:
        if isinstance(self.limit, str):
            object.__setattr__(self, "limit", _in_bytes("cache.limit", self.limit))
        super().__post_init__()
        if self.views is not None and self.where == "none":
            raise LowcalError(f"cache.views={self.views}: there is no cache; --set cache=memory, or leave it out")


def _in_bytes(key: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B", text)
    if match is None:
        raise LowcalError(f"{key}={text}: must be a number of bytes, or one with its unit, as in 8GiB")
    number, prefix = match.groups(default="")
    return round(float(number) * (1024 if prefix.endswith("i") else 1000) ** " KMGT".index(prefix[:1] or " "))


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """The optimizer: SGD, as in the paper, which names no momentum (0.9 is the usual one), or AdamW, which has its own.

    The classifier's learning rate is `head_lr` times that of the other layers. Gradients with a larger norm over all
    parameters than `max_norm` are scaled down to it (None: they are not).
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive
    head_lr: Positive = 1.0
    max_norm: Positive | None = None
    momentum: Annotated[float, Limits(least=0, below=1)] = 0.9
    weight_decay: NonNegative = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise LowcalError("optimizer.nesterov=true needs a momentum: set optimizer.momentum above 0")


@dataclass(frozen=True, kw_only=True)
class RateSettings(Settings):
    """The learning rate over the epochs; `factor` and `every` (epochs) belong to `step`.

    In the first `warmup_epochs`, whole ones or a part of one, the rate grows from step to step in proportion to the
    time. `epochs` is the length of the schedule (None: that of the run). A shorter run has the whole schedule, only
    faster (`fit="compressed"`), or its beginning (`fit="stopped"`).
    """

    name: Literal["step", "cosine", "constant"]
    factor: Fraction = 0.1
    every: Count = 30
    warmup_epochs: NonNegative = 0.0
    epochs: Count | None = None
    fit: Literal["compressed", "stopped"] = "compressed"


@dataclass(frozen=True, kw_only=True)
class EmaSettings(Settings):
    """The exponential mean of weights and running statistics, with which the network is evaluated and exported.

    Step n has the decay min(`decay`, n / (n + 9)); 0: there is no mean.
    """

    short: ClassVar[str] = "decay"

    decay: Annotated[float, Limits(least=0, below=1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Within an epoch a run is saved every `minutes` (None: at the ends of epochs only).

    A run that does not stop within `grace` seconds of a signal is killed (None: never).
    """

    minutes: Positive | None = 10.0
    grace: Positive | None = 30.0


@dataclass(frozen=True, kw_only=True)
class GuardSettings(Settings):
    """A run skips up to `max_skips` steps in a row whose loss or gradient is NaN or infinite; 0: one ends the run."""

    max_skips: Whole = 0


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Every setting of a run.

    `label` describes the run in a line (left out: made from the settings). `channels_last` puts the channels of images
    and weights last in memory (None: where it makes steps faster, which is on a CPU, and on a GPU in half precision).
    `threads` are torch's on the CPU (None: torch's choice). `deterministic` forbids algorithms whose result differs
    from run to run, which costs speed on a GPU. `tf32` lets float32 products on a GPU round their factors to 10 bits
    (None: torch's choice, which is in convolutions only). `label_smoothing` is the part of the target that all classes
    share (Szegedy et al. 2016). `batch` is that of all processes together; with
    `sync_batch_norm` they normalise by its statistics, else each by those of its shard.
    """

    name: Name
    label: str = ""  # filled in by what reads recipes
    epochs: Count
    batch: BatchSettings
    seed: Whole = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool | None = None
    step: Literal["auto", "eager", "compiled", "graphed", "graphed-compiled", "graphed-overlapped"] = "auto"
    threads: Count | None = None
    deterministic: bool = False
    tf32: bool | None = None
    sync_batch_norm: bool = False
    label_smoothing: Annotated[float, Limits(least=0, below=1)] = 0.0
    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    lr_schedule: RateSettings
    ema: EmaSettings
    local: LocalSettings
    stochastic_depth: StochasticDepthSettings
    prune: PruneSettings
    checkpoint: CheckpointSettings
    guard: GuardSettings
    cache: CacheSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        warmup, planned = self.lr_schedule.warmup_epochs, self.lr_schedule.epochs
        if warmup and warmup >= self.epochs:
            raise LowcalError(f"lr_schedule.warmup_epochs={warmup:g}: must be below epochs, which is {self.epochs}")
        if planned is not None and planned < self.epochs:
            raise LowcalError(f"lr_schedule.epochs={planned}: must be at least epochs, which is {self.epochs}")
        if self.model.frozen is not None and self.local.schedule.name == "budget":
            raise LowcalError(
                f"model.frozen={self.model.frozen}: a budget decides the boundary by itself; --set model.frozen=null"
            )


def lr_at(recipe: Recipe) -> Callable[[int], float]:
    """SGD's learning rate as a pure function of the epoch (counted from 0), without the warm-up.

    `step` decays by `factor` every `every` epochs, counted from epoch 0; `cosine` falls from the full rate to zero at
    the end of the last epoch; it begins after the warm-up. If a schedule of P epochs is compressed into a run of E,
    epoch e has the rate of epoch e P / E.
    """
    base, plan, epochs = recipe.optimizer.lr, recipe.lr_schedule, recipe.epochs
    planned = plan.epochs or epochs
    run = epochs if plan.fit == "compressed" else planned  # epochs of this run in which the whole schedule would pass
    warmup = plan.warmup_epochs

    def rate(epoch: int) -> float:
        if plan.name == "step":
            return base * plan.factor ** (epoch * planned // run // plan.every)
        if plan.name == "cosine":
            return base * 0.5 * (1 + math.cos(math.pi * max(0.0, epoch - warmup) / (run - warmup)))
        return base

    return rate
