"""Schedules of the boundary between local layers and SGD (Sec. 2.2 and 6.5).

A schedule is a pure function of `Progress`; the controller keeps the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lowcal.errors import LowcalError
from lowcal.settings import Count, Fraction, NonNegative, Settings


@dataclass(frozen=True)
class Progress:
    """What a schedule knows at the end of an epoch.

    Attributes:
        epoch: the coming epoch, 0-based: the one that the boundary is for.
        epochs: E_max, epochs in the whole training.
        layers: L, layers in the network.
        block: layers in the network's recurring block, the default of t_shift.
        boundary: T, the number of leading layers that learn locally now.
        changes: ||dW_E|| of the transition layer (`Schedule.measure`) in each epoch since the last move; the last is
            that of the epoch that has just ended.
        ends: the boundaries that are not inside a recurring block: after the last layer of each block, and after each
            layer outside of blocks.
        earlier: (T, ||dW_E||) of each epoch before the last move, the first epoch first; None unless
            `Schedule.remembers`.
        times: seconds of a training step at some boundaries, measured on a copy; empty unless `Schedule.measures`.
        taken: the boundary of each finished epoch, and the seconds that a step took in it; None if they are not known.
    """

    epoch: int
    epochs: int
    layers: int
    block: int
    boundary: int
    changes: tuple[float, ...]
    ends: tuple[int, ...] = ()
    earlier: tuple[tuple[int, float], ...] | None = None
    times: Mapping[int, float] = field(default_factory=dict)
    taken: tuple[tuple[int, float | None], ...] = ()


class Schedule(Protocol):
    """Decides the boundary of the next epoch. Your own schedule may inherit all but `__call__` from this class."""

    @property
    def measure(self) -> Literal["epoch", "step"]:
        """||dW_E||: the L2 norm of the weight's change over the "epoch", or the mean over its steps ("step")."""
        return "epoch"

    @property
    def remembers(self) -> bool:
        """Whether the norms of earlier transition layers are kept, and saved, for `Progress.earlier`."""
        return False

    @property
    def measures(self) -> bool:
        """Whether step times are measured, for `Progress.times` and `Progress.taken`."""
        return False

    def __call__(self, progress: Progress) -> int:
        """The boundary for the epoch `progress.epoch`: never less than `progress.boundary`."""
        ...

    def start(self, layers: int) -> int:
        """The boundary before the first epoch in a network of `layers` layers."""
        return 0

    def check(self, layers: int, epochs: int) -> None:
        """Raises LowcalError if this schedule does not fit a network of `layers` layers and `epochs` epochs."""
        return

    def reach(self, layers: int) -> int:
        """The largest boundary that this schedule can set in a network of `layers` layers."""
        return layers - 1

    def describe(self, progress: Progress) -> list[str]:
        """Lines on what is planned or was reached, for `LoCal.summary`."""
        return []


@dataclass(frozen=True)
class NormTrend(Settings, Schedule):
    """Algorithm 1: the boundary moves on when the transition layer's weight update falls below its running mean.

    Args:
        alpha: the fraction of the mean that the update may not exceed.
        shift: t_shift, layers per move; None: the network's recurring block.
        max_fraction: L_max, the boundary never exceeds floor(L_max L).
        interval: K, epochs before a move and norms in the mean; None: from Eq. 2.
        spacing: "listing": e_k >= K as Algorithm 1 counts e_k, so that moves are at least K + 1 epochs apart. "prose":
            at least K ("at most once in every K epochs", Sec. 2.2).
        measure: ||dW_E||: "epoch": the change over the epoch. "step": the mean norm of the changes of its steps.
        average: W_avg: "layer": the mean over norms of the present transition layer. "run": over norms of earlier ones
            too. With "listing" the last K norms always belong to the present layer.
        align: "layer": a move is by t_shift layers. "block": to the first end of a recurring block that is at least
            t_shift layers away, so that no block is split. The cap applies too.

    The mean is over the K norms before the last one. With ``spacing="prose"`` and ``average="layer"`` there are only
    K - 1 of them when K epochs have passed since the last move, and the mean is over those. At least one is needed, so
    with K = 1 moves are 2 epochs apart.
    """

    alpha: NonNegative = 0.95
    shift: Count | None = None
    max_fraction: Fraction = 0.75
    interval: Count | None = None
    spacing: Literal["listing", "prose"] = "listing"
    measure: Literal["epoch", "step"] = "epoch"
    average: Literal["layer", "run"] = "layer"
    align: Literal["layer", "block"] = "layer"

    @property
    def remembers(self) -> bool:
        """Whether W_avg includes norms of earlier transition layers."""
        return self.average == "run"

    def __call__(self, progress: Progress) -> int:
        """The boundary for the coming epoch (Algorithm 1)."""
        shift = self.shift or progress.block
        wait = self.interval or interval(progress.layers, shift, progress.epochs, self.max_fraction)
        *before, now = progress.changes
        waited = len(before) + (self.spacing == "prose")
        if self.remembers:
            before = [*(norm for _, norm in progress.earlier or ()), *before]
        last = before[-wait:]
        if waited < wait or not last or now > self.alpha * sum(last) / len(last):
            return progress.boundary
        most = cap(progress.layers, self.max_fraction)
        target = min(progress.boundary + shift, most)
        if self.align == "block":
            ends = [end for end in progress.ends if end <= most]
            target = next((end for end in ends if end >= target), max(ends, default=0))
        return max(progress.boundary, target)

    def reach(self, layers: int) -> int:
        """floor(L_max L)."""
        return cap(layers, self.max_fraction)


@dataclass(frozen=True)
class Quadratic(Settings, Schedule):
    """Eq. 3: T = floor(max(0, c1 - c2 (E - E_max)^2)), monotone and capped at floor(L_max L).

    Args:
        c1: layers that are local when training ends, before the cap.
        c2: layers by which the boundary is lower, per squared epoch before the end.
        max_fraction: L_max.
    """

    c1: NonNegative
    c2: NonNegative
    max_fraction: Fraction = 0.75

    def __call__(self, progress: Progress) -> int:
        """The boundary for the coming epoch (Eq. 3)."""
        target = math.floor(max(0.0, self.c1 - self.c2 * (progress.epoch - progress.epochs) ** 2))
        return max(progress.boundary, min(target, cap(progress.layers, self.max_fraction)))

    def reach(self, layers: int) -> int:
        """floor(L_max L)."""
        return cap(layers, self.max_fraction)


@dataclass(frozen=True)
class Fixed(Settings, Schedule):
    """Boundaries set by hand: the number of local layers from each 0-based epoch on.

    Args:
        boundaries: layers by epoch; those of epoch 0 are local from the start, for which `LoCal` needs
            ``example_inputs``.

    Example:
        >>> schedule = Fixed({0: 2, 10: 3, 20: 6})
    """

    boundaries: Mapping[int, int] = field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        previous = 0
        for epoch, layers in sorted(self.boundaries.items()):
            if epoch < 0:
                raise LowcalError(f"Fixed: epoch {epoch} is before the first one; give epochs of at least 0")
            if layers < previous:
                raise LowcalError(
                    f"Fixed: {layers} layers at epoch {epoch} after {previous} before; "
                    "give numbers that do not fall, since the boundary never moves back"
                )
            previous = layers
        object.__setattr__(self, "boundaries", dict(sorted(self.boundaries.items())))

    def __call__(self, progress: Progress) -> int:
        """The boundary given for the coming epoch or the last one before it."""
        due = (layers for epoch, layers in self.boundaries.items() if epoch <= progress.epoch)
        return max(progress.boundary, *due, 0)

    def start(self, layers: int) -> int:
        """The boundary of epoch 0."""
        return self.boundaries.get(0, 0)

    def reach(self, layers: int) -> int:
        """The last boundary given."""
        return max(self.boundaries.values(), default=0)

    def check(self, layers: int, epochs: int) -> None:
        """Raises LowcalError if a boundary leaves no layer to SGD."""
        for epoch, boundary in self.boundaries.items():
            if boundary >= layers:
                raise LowcalError(
                    f"Fixed: {boundary} layers at epoch {epoch}, but of the network's {layers} the last learns by SGD; "
                    f"give at most {layers - 1}"
                )


def reach(schedule: Schedule, layers: int) -> int:
    """The largest boundary that `schedule` can set; if it has no `reach`, all layers but the last."""
    own = getattr(schedule, "reach", None)
    return layers - 1 if own is None else min(own(layers), layers - 1)


def start(schedule: Schedule, layers: int) -> int:
    """The boundary before the first epoch; 0 if `schedule` has no `start`."""
    own = getattr(schedule, "start", None)
    return 0 if own is None else own(layers)


def interval(layers: int, shift: int, epochs: int, max_fraction: float) -> int:
    """K, the least number of epochs between two moves: E_max / (L_max L / t_shift), rounded, at least 1 (Eq. 2).

    Example:
        >>> interval(layers=54, shift=3, epochs=90, max_fraction=0.75)
        7
    """
    return max(1, round(epochs / (max_fraction * layers / shift)))


def cap(layers: int, max_fraction: float) -> int:
    """The largest number of local layers: floor(L_max L), and never the last layer."""
    return min(math.floor(max_fraction * layers + 1e-9), layers - 1)  # 1e-9: 0.29 * 100 is 28.999...
