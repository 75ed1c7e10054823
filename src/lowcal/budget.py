"""A schedule that keeps to a budget of time or of memory. Ours, beyond the paper."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Annotated

from lowcal.errors import LowcalError
from lowcal.schedule import Progress, Schedule, cap
from lowcal.settings import Fraction, Limits, Settings

NOISE = 1.02  # a budget may be out of reach by so much before it is refused: measured times are not exact
TRUST = 0.05  # a step that differs by more from the measured one differs because of other work on the machine


@dataclass(frozen=True)
class Budget(Settings, Schedule):
    """The least freezing that keeps to a budget, of time or of memory.

    With `speedup` the whole training takes 1 / `speedup` of its time without moves. The boundary stays at 0 for as many
    epochs as the budget allows, and then goes to floor(max_fraction L). Step times at a few boundaries are measured on
    a copy of the model at the end of the first epoch. After each epoch the rest is planned again by the time that its
    steps really took. `LoCal.summary` says the plan, and at the end what was reached.

    With `memory` the peak memory of a training step is at most this part of that of a step at boundary 0. The least
    boundary for which this holds is set before the first step and stays. It is found by dry runs that compute nothing.
    `LoCal` needs ``example_inputs`` for it, and they must be a whole mini-batch, since memory depends on its size.

    Args:
        speedup: the time of the training at boundary 0 over its time with moves.
        memory: the peak memory of a step over that at boundary 0. Give one of the two.
        max_fraction: the boundary never exceeds floor(max_fraction L).

    Raises:
        LowcalError: both or none is given. At the end of the first epoch, or for `memory` when `LoCal` is built: no
            boundary meets the budget; the message has the nearest possible one.
    """

    speedup: Annotated[float, Limits(above=1)] | None = None
    memory: Annotated[float, Limits(above=0, below=1)] | None = None
    max_fraction: Fraction = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.speedup is None) == (self.memory is None):
            raise LowcalError("Budget: give speedup or memory, one of the two")

    @property
    def measures(self) -> bool:
        """Whether step times are needed."""
        return self.speedup is not None

    def __call__(self, progress: Progress) -> int:
        """The least boundary with which the budget can still be met."""
        if self.speedup is None:
            return progress.boundary
        if progress.epoch == 1:
            self.check_times(progress)
        most = cap(progress.layers, self.max_fraction)
        cost = costs(progress)
        spent = sum(cost(boundary) for boundary, _ in progress.taken)
        later = progress.epochs - progress.epoch - 1  # epochs after the coming one
        left = progress.epochs / self.speedup - spent - later * cost(most)
        boundaries = range(progress.boundary, most + 1)
        return next(
            (boundary for boundary in boundaries if cost(boundary) <= left + 1e-9), max(most, progress.boundary)
        )

    def reach(self, layers: int) -> int:
        """floor(max_fraction L)."""
        return cap(layers, self.max_fraction)

    def start(self, layers: int) -> int:
        """At least 1 with a budget of memory; `held` says which."""
        return int(self.memory is not None)

    def check_times(self, progress: Progress) -> None:
        """Raises LowcalError if no path of the boundary meets the budget by the measured times."""
        most = cap(progress.layers, self.max_fraction)
        least = interpolated(progress.times, most) / progress.times[0]
        possible = progress.epochs / (1 + (progress.epochs - 1) * least)
        if self.speedup is not None and self.speedup > NOISE * possible:
            raise LowcalError(
                f"Budget: a speed-up of {self.speedup:g} is out of reach: with {most} of {progress.layers} layers "
                f"from the second epoch on it is {possible:.2f}; give less, or a larger max_fraction"
            )

    def held(self, layers: int, bytes_of: Callable[[int], int]) -> int:
        """The least boundary above 0 that meets the budget of memory; memory falls as the boundary moves on.

        Args:
            layers: L.
            bytes_of: the peak memory of a training step at a boundary.

        Raises:
            LowcalError: there is none.
        """
        assert self.memory is not None
        most, plain, allowed = cap(layers, self.max_fraction), bytes_of(0), self.memory
        if (least := bytes_of(most) / plain) > allowed:
            raise LowcalError(
                f"Budget: {allowed:g} of the memory is out of reach: with {most} of {layers} layers before the "
                f"boundary a step takes {math.ceil(100 * least) / 100:.2f} of it; give more, or a larger max_fraction"
            )
        return 1 + bisect_left(range(1, most + 1), True, key=lambda boundary: bytes_of(boundary) <= allowed * plain)

    def path(self, progress: Progress) -> tuple[int, ...]:
        """The boundary of each epoch: as it was, and as it is planned from here on."""
        if not progress.taken:  # before the first epoch, which takes no move
            progress = replace(progress, epoch=1, taken=((progress.boundary, None),))
        while progress.epoch < progress.epochs:
            taken = (*progress.taken, (boundary := self(progress), None))
            progress = replace(progress, epoch=progress.epoch + 1, boundary=boundary, taken=taken)
        return tuple(boundary for boundary, _ in progress.taken)

    def reached(self, progress: Progress) -> float:
        """The speed-up of `path`, by step times."""
        return progress.epochs / sum(map(costs(progress), self.path(progress)))

    def describe(self, progress: Progress) -> list[str]:
        """The plan, from the end of the first epoch on; at the end what was reached."""
        if self.speedup is None or not progress.times:
            return []
        reached = f"{self.reached(progress):.2f}x"
        if progress.epoch >= progress.epochs:
            return [f"budget: asked {self.speedup:.2f}x, measured {reached} by step times"]
        path = self.path(progress)
        moves = [f"{new} from epoch {epoch} on" for epoch, (old, new) in enumerate(pairwise(path), 2) if new > old]
        return [
            f"budget {self.speedup:g}x: layers before the boundary: {', '.join([str(path[0]), *moves])} "
            f"(of {progress.epochs} epochs); expected {reached}"
        ]


def costs(progress: Progress) -> Callable[[int], float]:
    """The time of an epoch at a boundary in units of one at boundary 0.

    As measured on copies, which take their steps in turn, and corrected by what the steps of finished epochs took.
    Other work on the machine makes these longer in some epochs only, so the correction has the limit `TRUST`.
    """
    known: dict[int, list[float]] = {}
    for boundary, seconds in progress.taken:
        if seconds is not None:
            known.setdefault(boundary, []).append(seconds)

    def cost(boundary: int) -> float:
        measured = interpolated(progress.times, boundary) / progress.times[0]
        if boundary not in known or 0 not in known:
            return measured
        found = median(known[boundary]) / median(known[0])
        return min(max(found, (1 - TRUST) * measured), (1 + TRUST) * measured)

    return cost


def interpolated(times: Mapping[int, float], boundary: int) -> float:
    """The time at `boundary`, on straight lines between those of `times`."""
    if boundary in times:
        return times[boundary]
    for (low, before), (high, after) in pairwise(sorted(times.items())):
        if low < boundary < high:
            return before + (after - before) * (boundary - low) / (high - low)
    return times[max(times) if boundary > max(times) else min(times)]
