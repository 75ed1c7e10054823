"""What `lowcal bench` measures."""

from __future__ import annotations

from dataclasses import dataclass

from lowcal.errors import LowcalError


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        model: a network's name.
        batch: images in a mini-batch.
        image_size: their height and width.
        boundaries: as fractions of the network's layers; 0 is always measured too.
        width: channels of the network's first stage; None: its own.
        precision: "float32", "bf16" or "fp16".
        tf32: whether float32 products on a GPU round their factors to 10 bits; None: torch's choice.
        channels_last: the memory format; None: the one with the faster steps (`puts_channels_last`).
        step: how a step is run: "eager", "compiled" or "graphed".
        norm_stats: what normalisation before the boundary normalises by.
        every: local updates in each `every`-th step, in a row of its own; 1 leaves that row out.
        rounds: samples of each time.
        warm_up: samples before those.
        runs: steps in a sample; None: 1 on CPU, 10 on a device that works on its own.
        epochs: of the run whose speed-up is predicted.
        layers: whether single layers are timed too.
    """

    model: str
    batch: int
    image_size: int
    classes: int = 10
    boundaries: tuple[float, ...] = (0.25, 0.5, 0.75)
    width: int | None = None
    precision: str = "float32"
    tf32: bool | None = None
    channels_last: bool | None = None
    step: str = "eager"
    norm_stats: str = "batch"
    every: int = 4
    rounds: int = 20
    warm_up: int = 3
    runs: int | None = None
    epochs: int = 90
    layers: bool = True

    def __post_init__(self) -> None:
        for fraction in self.boundaries:
            if not 0 <= fraction < 1:
                raise LowcalError(f"boundary {fraction}: give fractions of the layers, from 0 to below 1")
        for name in ("batch", "image_size", "every", "rounds", "warm_up", "epochs"):
            if getattr(self, name) < 1:
                raise LowcalError(f"{name} is {getattr(self, name)}; give at least 1")


def parse_boundaries(text: str) -> tuple[float, ...]:
    """The fractions in `text`, which commas separate."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LowcalError(f"boundaries {text!r}: give fractions separated by commas, as in 0,0.25,0.5") from None
