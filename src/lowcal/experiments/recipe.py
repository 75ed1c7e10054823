"""Recipes: every setting of a run in one frozen, checked object.

A recipe is a YAML file. Those of the package lie in `recipes/`; a user's own is given by its path.
`--set a.b=value` changes single settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversions, no infinities.

    A section may have a `short` field: a plain value in the section's place is that field's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    short: ClassVar[str | None] = None


class ModelSettings(Settings):
    """The network; `width` is the channels of the first stage (None: the network's own)."""

    name: Name
    width: Count | None = None


class DataSettings(Settings):
    """The images; `evaluate="validation"` holds out a part of the training images in the test set's place.

    `workers` processes decode imagenet's files (None: one per processor, 16 at most); they change no image.
    `seed` decides subsets and splits, so that runs whose own seeds differ see the same images.
    """

    name: Literal["digits", "cifar10", "cifar100", "image-folder", "imagenet", "synthetic"]
    seed: Whole = 0
    train_images: Count | None = None
    test_images: Count | None = None
    image_size: Count | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    evaluate: Literal["test", "validation"] = "test"
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    on_error: Literal["stop", "skip"] = "stop"
    download: bool = True
    workers: Whole | None = None


class BatchSettings(Settings):
    """Images in a mini-batch; with `grow` they double when a move of the boundary has freed the memory for it.

    `memory_limit`: bytes that a training step may take, or text such as 8GiB (None: what a step took in the first
    epoch). With `scale_lr` SGD's learning rate grows with the batch.
    """

    short: ClassVar[str | None] = "size"

    size: Count
    grow: bool = False
    memory_limit: Count | None = None
    scale_lr: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_a_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict | BatchSettings) else {"size": value}

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B", value)
        if match is None:
            raise ValueError(f"batch.memory_limit={value}: must be a number of bytes, or one with its unit, as in 8GiB")
        number, prefix = match.groups(default="")
        return round(float(number) * (1024 if prefix.endswith("i") else 1000) ** " KMGT".index(prefix[:1] or " "))


class OptimizerSettings(Settings):
    """SGD's settings; the paper names no momentum, 0.9 is the usual one."""

    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSettings:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov=true needs a momentum: set optimizer.momentum above 0")
        return self


class RateSettings(Settings):
    """The learning rate over the epochs; `factor` and `every` (epochs) are those of `step`.

    `epochs` are those that the schedule is laid out for (None: the run's). A run of fewer has the whole schedule, only
    faster (`fit="compressed"`), or its beginning (`fit="stopped"`).
    """

    name: Literal["step", "cosine", "constant"]
    factor: Fraction = 0.1
    every: Count = 30
    warmup_epochs: Whole = 0
    epochs: Count | None = None
    fit: Literal["compressed", "stopped"] = "compressed"


class ScheduleSettings(Settings):
    """Where the boundary is: Algorithm 1 (`norm-trend`), Eq. 3 (`quadratic`) or a table (`fixed`)."""

    name: Literal["norm-trend", "quadratic", "fixed"] = "norm-trend"
    alpha: NonNegative = 0.95
    shift: Count | None = None
    max_fraction: Fraction = 0.75
    interval: Count | None = None
    spacing: Literal["listing", "prose"] = "listing"
    measure: Literal["epoch", "step"] = "epoch"
    average: Literal["layer", "run"] = "layer"
    align: Literal["layer", "block"] = "layer"
    c1: NonNegative | None = None
    c2: NonNegative | None = None
    epochs: dict[Whole, Whole] | None = None

    @model_validator(mode="after")
    def _fits_its_name(self) -> ScheduleSettings:
        owners = {"c1": "quadratic", "c2": "quadratic", "epochs": "fixed"}
        for field, owner in owners.items():
            given = getattr(self, field) is not None
            if given and self.name != owner:
                raise ValueError(
                    f"local.schedule.{field} belongs to the schedule '{owner}', not to '{self.name}': "
                    f"set local.schedule.name={owner} or leave it out"
                )
            if not given and self.name == owner:
                raise ValueError(f"local.schedule.{field} is missing: the schedule '{owner}' needs it")
        return self


class LocalSettings(Settings):
    """Local learning: Eq. 4's step and its decay, weak supervision, and the schedule."""

    lr: Positive = 0.01
    decay: Fraction = 0.5
    decay_every: Count = 30
    scale: Literal["absolute", "relative"] = "absolute"
    every: Count = 1
    decay_from: Literal["start", "switch"] = "start"
    refresh_every: Annotated[int, Field(ge=2)] = 4
    norm_stats: Literal["batch", "running"] = "batch"
    supervision: bool = True
    sign: Literal["recomputed", "kept"] = "recomputed"
    schedule: ScheduleSettings = ScheduleSettings()


class StochasticDepthSettings(Settings):
    """Stochastic depth: `survival` is p_L, the probability with which the last residual block takes part."""

    survival: Fraction = 0.5


class PruneSettings(Settings):
    """PruneTrain: the penalty's part of the first loss, epochs between removals, and when a weight counts as zero."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    every: Count = 10
    threshold: Positive = 1e-4


class CheckpointSettings(Settings):
    """Within an epoch a run is saved every `minutes` (None: at the ends of epochs alone).

    A run that has not heeded a signal for `grace` seconds is ended from outside (None: never).
    """

    minutes: Positive | None = 10.0
    grace: Positive | None = 30.0


class GuardSettings(Settings):
    """Steps skipped in a row, for a NaN or infinite loss or gradient, that a run survives; 0: one such loss ends it."""

    max_skips: Whole = 0


class Recipe(Settings):
    """Every setting of a run.

    `label` is a line about it (left out: one is made from the settings).
    `channels_last` puts the channels of images and weights
    last in memory (None: where steps are the faster for it: on a CPU, and on a GPU in half precision). `threads` are
    torch's on the CPU (None: torch's choice). `deterministic` lets torch use no algorithm whose result changes from run
    to run, which on a GPU costs speed. `tf32` lets float32 products on a GPU round their factors to 10 bits (None:
    torch's choice, in convolutions alone).
    `batch` is that of all processes together; with `sync_batch_norm` they normalise by its statistics, not by those of
    their shares.
    """

    name: Name
    label: str = ""  # filled in by what reads recipes
    epochs: Count
    batch: BatchSettings
    seed: Whole = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool | None = None
    step: Literal["auto", "eager", "compiled", "graphed"] = "auto"
    threads: Count | None = None
    deterministic: bool = False
    tf32: bool | None = None
    sync_batch_norm: bool = False
    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    lr_schedule: RateSettings
    local: LocalSettings = LocalSettings()
    stochastic_depth: StochasticDepthSettings = StochasticDepthSettings()
    prune: PruneSettings = PruneSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()

    @model_validator(mode="after")
    def _warmup_ends(self) -> Recipe:
        warmup = self.lr_schedule.warmup_epochs
        if warmup and warmup >= self.epochs:
            raise ValueError(f"lr_schedule.warmup_epochs={warmup}: must be below epochs, which is {self.epochs}")
        return self

    @model_validator(mode="after")
    def _schedule_is_as_long(self) -> Recipe:
        planned = self.lr_schedule.epochs
        if planned is not None and planned < self.epochs:
            raise ValueError(f"lr_schedule.epochs={planned}: must be at least epochs, which is {self.epochs}")
        return self


def lr_at(recipe: Recipe) -> Callable[[int], float]:
    """SGD's learning rate as a pure function of the epoch (counted from 0).

    `step` decays by `factor` each `every` epochs, counted from epoch 0; `cosine` falls from the full rate to
    zero at the end of the last epoch. In a warm-up of n epochs, epoch e has (e + 1) / (n + 1) of the rate.
    Where the schedule is laid out for P epochs and compressed into a run of E, epoch e has the rate of e P / E.
    """
    base, plan, epochs = recipe.optimizer.lr, recipe.lr_schedule, recipe.epochs
    planned = plan.epochs or epochs
    run = epochs if plan.fit == "compressed" else planned  # epochs of this run in which the whole schedule would pass
    warmup = plan.warmup_epochs

    def rate(epoch: int) -> float:
        if epoch < warmup:
            return base * (epoch + 1) / (warmup + 1)
        if plan.name == "step":
            return base * plan.factor ** (epoch * planned // run // plan.every)
        if plan.name == "cosine":
            return base * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (run - warmup)))
        return base

    return rate
