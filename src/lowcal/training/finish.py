"""What a finished run leaves: its summary and the network's weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowcal.files import atomic_write
from lowcal.training.record import RunFolder

WEIGHTS = "model.pt"
SAFE_WEIGHTS = "model.safetensors"


def write_summary(folder: RunFolder) -> dict[str, Any]:
    """Writes the `summary.json` of all epochs in the log; returns what it holds."""
    records = folder.read_epochs()
    last = records[-1]
    return folder.write_summary(
        {
            **folder.read_identity(),
            "top1_error": last["top1_error"],
            "best_top1_error": min(record["top1_error"] for record in records),
            "seconds": last["total_seconds"],
            "flops": sum(record["flops"] for record in records),
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
            "boundary": last["boundary"],
            "layers": last["layers"],
        }
    )


def export_weights(model: nn.Module, folder: Path) -> None:
    """Writes the `state_dict` as `model.pt`, for `torch.load` with `weights_only`, and as `model.safetensors`.

    The tensors are on the processor, each with memory of its own. Without the safetensors library the second file is
    left out.

    Raises:
        LowcalError: the system refuses; no part of a file is left.
    """
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    atomic_write(folder / WEIGHTS, buffer.getbuffer())
    try:
        from safetensors.torch import save
    except ImportError:
        return
    atomic_write(folder / SAFE_WEIGHTS, save(weights, metadata={"format": "pt"}))
