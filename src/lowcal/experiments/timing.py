"""Times of several pieces of work that take turns, so that the machine's drift hits all alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lowcal.training.step import now


@dataclass(frozen=True)
class Work:
    """Something to be timed.

    Attributes:
        run: does it once.
        prepare: called before each sample, outside the time, with the number of runs to come.
        period: runs after which the work repeats; a sample is a whole number of periods.
    """

    run: Callable[[], object]
    prepare: Callable[[int], object] | None = None
    period: int = 1


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median and quartiles over the samples."""

    median: float
    q25: float
    q75: float


def take_turns(
    works: Mapping[str, Work], *, rounds: int, warm_up: int, runs: int | None = None, device: torch.device
) -> dict[str, Timing]:
    """Times `works`, one sample of each in turn, beginning with another one in each round.

    Args:
        rounds: samples of each.
        warm_up: samples of each before those, which do not count.
        runs: runs in a sample, at least; None: 1 on CPU, 10 on a device that works on its own, so that the host runs
            ahead.
        device: waited for before and after each sample.
    """
    if runs is None:
        runs = 1 if device.type == "cpu" else 10
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    was_enabled = gc.isenabled()
    gc.disable()  # a collection would fall into some sample or other
    try:
        for turn in range(-warm_up, rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                milliseconds = _sample(works[name], runs, device)
                if turn >= 0:
                    samples[name].append(milliseconds)
    finally:
        if was_enabled:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples: list[float]) -> Timing:
    """Median and quartiles of `samples`."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75)


def _sample(work: Work, runs: int, device: torch.device) -> float:
    count = -(-runs // work.period) * work.period
    if work.prepare is not None:
        work.prepare(count)
    start = now(device)
    for _ in range(count):
        work.run()
    return 1000.0 * (now(device) - start) / count
