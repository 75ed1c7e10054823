"""The steps of an epoch so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowcal.errors import LowcalError

Shape = tuple[int, ...]


class DivergedError(Exception):
    """Losses or gradients are NaN or infinite, up to `step`, counted from 1."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.step = step


class EpochState:
    """The steps of an epoch so far, on which its record and the checks of later steps depend.

    Args:
        steps: in the whole epoch.
        device: of the losses; only `check` and what comes after the last step wait for it.
        in_a_row: skipped steps at the end of the epoch before.

    Attributes:
        losses: of each step, (steps,).
        skipped: whether each step was skipped, (steps,).
        shapes: of each step's images.
        images: in the steps so far.
        seconds: training time.
        peak: most bytes of memory, where the device measures them.
    """

    def __init__(self, steps: int, device: torch.device, *, in_a_row: int = 0) -> None:
        self.losses = torch.zeros(steps, device=device)
        self.skipped = torch.zeros(steps, dtype=torch.bool, device=device)
        self.shapes: list[Shape] = []
        self.images = 0
        self.seconds = 0.0
        self.peak = 0
        self._times: list[float] = []
        self._in_a_row = in_a_row

    @property
    def steps(self) -> int:
        """Steps in the epoch."""
        return len(self.losses)

    @property
    def done(self) -> int:
        """Finished steps."""
        return len(self.shapes)

    def add(self, loss: Tensor, skipped: Tensor | None, shape: Shape, seconds: float) -> None:
        """Adds a step. `skipped` is a 0-d bool on the device, or None if no step is ever skipped."""
        self.losses[self.done] = loss
        if skipped is not None:
            self.skipped[self.done] = skipped
        self.shapes.append(tuple(shape))
        self.images += shape[0]
        self._times.append(seconds)

    def check(self, max_skips: int) -> None:
        """Checks all steps so far; waits for the device.

        Raises:
            DivergedError: `max_skips` is 0 and a loss is not finite, or more than `max_skips` steps in a row were
                skipped.
        """
        if not max_skips:
            losses = self.losses[: self.done]
            if not bool(losses.isfinite().all()):
                first = int((~losses.isfinite()).nonzero()[0])
                raise DivergedError(f"the training loss became {float(losses[first])}", first + 1)
            return
        if not bool(self.skipped[: self.done].any()):
            return
        for step, in_a_row in enumerate(self._skips_in_a_row(), start=1):
            if in_a_row > max_skips:
                raise DivergedError(
                    f"{in_a_row} steps in a row were skipped, since their loss or gradient was NaN or infinite "
                    f"(guard.max_skips is {max_skips}), the last",
                    step,
                )

    def loss_so_far(self) -> float:
        """The mean over the steps with a finite loss; waits for the device."""
        losses = self.losses[: self.done]
        return float(losses.where(losses.isfinite(), torch.nan).nanmean())

    # After the last step

    def mean_loss(self) -> float:
        """The mean over the images of all steps with a finite loss; NaN if there is none."""
        losses = self.losses.double().cpu()
        sizes = torch.tensor([shape[0] for shape in self.shapes], dtype=torch.float64)
        finite = losses.isfinite()
        return (
            float(losses[finite] @ sizes[finite]) / float(sizes[finite].sum()) if bool(finite.any()) else float("nan")
        )

    def facts(self) -> dict[str, float | int]:
        """The fields of the epoch's record that depend on its steps alone.

        The time of a step is the median; on CUDA, where the host runs ahead of the device, the mean.
        """
        is_cuda = self.losses.device.type == "cuda"
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "step_ms": 1000.0 * (self.seconds / self.steps if is_cuda else statistics.median(self._times)),
            "images_per_second": self.images / self.seconds,
            "skipped_steps": int(self.skipped.sum()),
        }

    def final_skips(self) -> int:
        """Skipped steps at the end of the epoch."""
        return self._skips_in_a_row()[-1]

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
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
        """Loads what `state_dict` returned.

        Raises:
            LowcalError: it has another number of steps.
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

    def _skips_in_a_row(self) -> list[int]:
        """For each step so far, the number of skipped steps in a row that end with it."""
        counts, count = [], self._in_a_row
        for skipped in self.skipped[: self.done].tolist():
            count = count + 1 if skipped else 0
            counts.append(count)
        return counts
