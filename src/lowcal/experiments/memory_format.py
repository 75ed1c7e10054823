"""Where images and weights have their channels in memory."""

from __future__ import annotations

import torch


def puts_channels_last(asked: bool | None, device: torch.device, precision: str) -> bool:
    """Whether the channels come last: as `asked`, or with None where steps are the faster for it.

    That is so on a processor, as measured (docs/performance.md, "Memory format"), and on a GPU in half precision, whose
    matrix units want them so. In single precision there it was not measured, and they come first, as torch has them.
    """
    if asked is not None:
        return asked
    return device.type != "cuda" or precision != "float32"
