"""What the steps of an epoch have given so far."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowcal.errors import LowcalError

Shape = tuple[int, ...]


class DivergedError(Exception):
    """Losses or gradients are NaN or infinite; its text says what, `step`, counted from 1, is the last one."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.step = step


class Part:
    """The part of an epoch that is done: what its record, and the checks of the steps to come, depend on.

    Args:
        steps: in the whole epoch.
        device: where losses are; nothing but `check` and what comes after the steps waits for it.
        in_a_row: skipped steps with which the epoch before ended.

    Attributes:
        losses: of each step, (steps,).
        skipped: whether that step was skipped, (steps,).
        shapes: of each step's images.
        seconds: training time.
        peak: most bytes of memory, where that is measured.
    """

    def __init__(self, steps: int, device: torch.device, *, in_a_row: int = 0) -> None:
        self.losses = torch.zeros(steps, device=device)
        self.skipped = torch.zeros(steps, dtype=torch.bool, device=device)
        self.shapes: list[Shape] = []
        self.seconds = 0.0
        self.peak = 0
        self.images = 0
        self._times: list[float] = []
        self._in_a_row = in_a_row

    @property
    def steps(self) -> int:
        """Steps in the epoch."""
        return len(self.losses)

    @property
    def done(self) -> int:
        """Steps that are done."""
        return len(self.shapes)

    def add(self, loss: Tensor, skipped: Tensor | None, shape: Shape, seconds: float) -> None:
        """Takes in a step; `skipped` is a 0-d truth value on the device, None where no step ever is."""
        self.losses[self.done] = loss
        if skipped is not None:
            self.skipped[self.done] = skipped
        self.shapes.append(tuple(shape))
        self.images += shape[0]
        self._times.append(seconds)

    def check(self, max_skips: int) -> None:
        """Looks at all steps so far; waits for the device.

        Raises:
            DivergedError: `max_skips` is 0 and a loss is not finite, or more steps in a row were skipped.
        """
        if not max_skips:
            losses = self.losses[: self.done]
            if not bool(losses.isfinite().all()):
                first = int((~losses.isfinite()).nonzero()[0])
                raise DivergedError(f"the training loss became {float(losses[first])}", first + 1)
            return
        if not bool(self.skipped[: self.done].any()):
            return
        for step, in_a_row in enumerate(self._runs(), start=1):
            if in_a_row > max_skips:
                raise DivergedError(
                    f"{in_a_row} steps in a row were skipped, since their loss or gradient was NaN or infinite "
                    f"(guard.max_skips is {max_skips}), the last",
                    step,
                )

    def loss_so_far(self) -> float:
        """The mean over the steps whose loss is finite; waits for the device."""
        losses = self.losses[: self.done]
        return float(losses.where(losses.isfinite(), torch.nan).nanmean())

    # Once all steps are done

    def mean_loss(self) -> float:
        """The mean over the epoch's images, those left out whose loss is not finite; NaN if that is all."""
        losses = self.losses.double().cpu()
        sizes = torch.tensor([shape[0] for shape in self.shapes], dtype=torch.float64)
        good = losses.isfinite()
        return float(losses[good] @ sizes[good]) / float(sizes[good].sum()) if bool(good.any()) else float("nan")

    def shape_counts(self) -> Counter[Shape]:
        """How many mini-batches of images there were of which shape."""
        return Counter(self.shapes)

    def facts(self) -> dict[str, float | int]:
        """What the run's log says of the epoch's steps.

        The time of one is the median, or on CUDA, where the host runs ahead of the device, the mean.
        """
        is_cuda = self.losses.device.type == "cuda"
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "step_ms": 1000.0 * (self.seconds / self.steps if is_cuda else statistics.median(self._times)),
            "images_per_second": self.images / self.seconds,
            "skipped_steps": int(self.skipped.sum()),
        }

    def in_a_row(self) -> int:
        """Skipped steps with which the epoch ends."""
        return self._runs()[-1]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All of it: tensors and plain values."""
        return {
            "losses": self.losses.clone(),
            "skipped": self.skipped.clone(),
            "shapes": torch.tensor(self.shapes),
            "times": torch.tensor(self._times, dtype=torch.float64),
            "seconds": self.seconds,
            "peak": self.peak,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            LowcalError: it is of an epoch of another number of steps.
        """
        shapes: list[list[int]] = state["shapes"].tolist()
        if len(state["losses"]) != self.steps or not 0 < len(shapes) <= self.steps:
            raise LowcalError(f"it is of an epoch of {len(state['losses'])} steps, here one has {self.steps}")
        self.losses.copy_(state["losses"])
        self.skipped.copy_(state["skipped"])
        self.shapes = [tuple(shape) for shape in shapes]
        self.images = sum(shape[0] for shape in self.shapes)
        self._times = state["times"].tolist()
        self.seconds, self.peak, self._in_a_row = state["seconds"], state["peak"], state["in_a_row"]

    def _runs(self) -> list[int]:
        """After each step so far, how many were skipped in a row."""
        runs, run = [], self._in_a_row
        for skipped in self.skipped[: self.done].tolist():
            run = run + 1 if skipped else 0
            runs.append(run)
        return runs
