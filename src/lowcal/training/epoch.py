"""The steps of one epoch: timed, watched, and never waiting for the device on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

from lowcal.data import Loader
from lowcal.errors import LowcalError
from lowcal.training.part import Part
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


class Pause(Protocol):
    """What may come between two steps: a checkpoint, or the end of the program."""

    def is_due(self) -> bool:
        """Whether `__call__` wants to be called now; asked once after each step."""

    def is_urgent(self) -> bool:
        """Whether it wants to be called even though no further step can be taken."""

    def __call__(self) -> None:
        """Saves; the device has done all that was asked of it, and the losses so far are good."""


def now(device: torch.device) -> float:
    """Seconds on the clock once `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def train_epoch(
    step: Step,
    batches: Loader,
    part: Part,
    *,
    device: torch.device,
    epoch: int,
    epochs: int,
    boundary: int,
    layers: int,
    max_skips: int = 0,
    progress: Callable[[Progress], None] | None = None,
    pause: Pause | None = None,
) -> None:
    """Takes one step with each mini-batch that is left of the epoch; the arguments of `Progress` are for it alone.

    Args:
        part: what was done of the epoch before; receives what is done now. The time that pauses take is not counted.
        max_skips: steps that may be skipped in a row; 0: no loss may be other than finite.
        pause: what may come after each step, the last included.

    Raises:
        DivergedError: too many losses or gradients are NaN or infinite; it is found within 100 steps.
    """
    steps = part.steps
    start = last = shown = now(device)

    def rest(pause: Pause | None) -> None:
        nonlocal start, last
        part.seconds += now(device) - start
        part.check(max_skips)
        if pause is not None:
            pause()
        start = last = now(device)

    passing = batches.raw_batches() if part.done < steps else iter(())
    while True:
        try:
            given = next(passing)
        except StopIteration:
            break
        except LowcalError:
            if pause is not None and pause.is_urgent():  # a signal to the whole process group ends loading too
                rest(pause)
            raise
        loss = step(*given)
        moment = perf_counter()
        part.add(loss, step.skipped, (batches.global_batch, *batches.shape), moment - last)
        last = moment
        done = part.done
        if done % CHECK_EVERY == 0:
            part.check(max_skips)
        if progress and (done == steps or moment - shown >= SHOW_EVERY):
            shown = moment
            elapsed = part.seconds + moment - start
            progress(
                Progress(
                    epoch=epoch,
                    epochs=epochs,
                    step=done,
                    steps=steps,
                    loss=part.loss_so_far(),
                    boundary=boundary,
                    layers=layers,
                    images_per_second=part.images / elapsed,
                    seconds_left=elapsed / done * (steps - done + steps * (epochs - epoch - 1)),
                )
            )
        # After the last step the loader must come to its end first: its state is then that of the next epoch.
        if done < steps and pause is not None and pause.is_due():
            rest(pause)
    rest(pause if pause is not None and pause.is_due() else None)
