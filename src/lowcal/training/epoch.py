"""The steps of one epoch: timed, watched, and never waiting for the device on the way."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from lowcal.data import Loader
from lowcal.training.step import Step

CHECK_EVERY = 100  # steps; looking at the losses waits for the device
SHOW_EVERY = 0.25  # seconds; so does showing them


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a line on the screen.

    Attributes:
        epoch: 0-based.
        epochs: in the whole run.
        step: steps of this epoch that are done.
        steps: in this epoch.
        loss: mean training loss of this epoch so far.
        boundary: leading layers that do not learn by SGD.
        layers: weight layers of the network.
        images_per_second: in this epoch so far.
        seconds_left: of training, in the whole run, at this epoch's pace.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    boundary: int
    layers: int
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Trained:
    """What one epoch of training gave.

    Attributes:
        loss: mean over the epoch's images.
        seconds: wall time of all steps.
        step_ms: of one step: the median, or on CUDA, where the host runs ahead of the device, the mean.
        shapes: how many mini-batches of images there were of which shape.
    """

    loss: float
    seconds: float
    step_ms: float
    shapes: Counter[tuple[int, ...]]

    @property
    def steps(self) -> int:
        """Steps in the epoch."""
        return self.shapes.total()

    @property
    def images(self) -> int:
        """Images in the epoch."""
        return sum(shape[0] * count for shape, count in self.shapes.items())


class DivergedError(Exception):
    """A step's loss is NaN or infinite; `step` counts from 1."""

    def __init__(self, loss: float, step: int) -> None:
        super().__init__(loss, step)
        self.loss = loss
        self.step = step


def now(device: torch.device) -> float:
    """Seconds on the clock once `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def train_epoch(
    step: Step,
    batches: Loader,
    *,
    device: torch.device,
    epoch: int,
    epochs: int,
    boundary: int,
    layers: int,
    progress: Callable[[Progress], None] | None,
) -> Trained:
    """Takes one step with each mini-batch; the arguments that `Progress` has too are for it alone.

    Raises:
        DivergedError: a loss is NaN or infinite; it is found within 100 steps.
    """
    steps = len(batches)
    losses = torch.zeros(steps, device=device)
    sizes: list[int] = []
    times: list[float] = []
    shapes: Counter[tuple[int, ...]] = Counter()
    start = last = shown = now(device)
    for index, (images, labels) in enumerate(batches):
        losses[index] = step(images, labels)
        shapes[tuple(images.shape)] += 1
        sizes.append(len(labels))
        moment = perf_counter()
        times.append(moment - last)
        last = moment
        done = index + 1
        if done % CHECK_EVERY == 0 or done == steps:
            _check(losses[:done])
        if progress and (done == steps or moment - shown >= SHOW_EVERY):
            shown = moment
            elapsed = moment - start
            progress(
                Progress(
                    epoch=epoch,
                    epochs=epochs,
                    step=done,
                    steps=steps,
                    loss=float(losses[:done].mean()),
                    boundary=boundary,
                    layers=layers,
                    images_per_second=sum(sizes) / elapsed,
                    seconds_left=elapsed / done * (steps - done + steps * (epochs - epoch - 1)),
                )
            )
    seconds = now(device) - start
    loss = float(losses.double().cpu() @ torch.tensor(sizes, dtype=torch.float64)) / sum(sizes)
    step_seconds = seconds / steps if device.type == "cuda" else statistics.median(times)
    return Trained(loss, seconds, 1000.0 * step_seconds, shapes)


def _check(losses: Tensor) -> None:
    if not bool(losses.isfinite().all()):
        first = int((~losses.isfinite()).nonzero()[0])
        raise DivergedError(float(losses[first]), first + 1)
