"""The same figures from the same seed, bit for bit, on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowcal.errors import LowcalError


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With `on`, let torch use no algorithm whose result changes from run to run; on leaving it is as before.

    Raises:
        LowcalError: an operation of the network has no such algorithm on this device.
    """
    if not on:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(", but")[0].partition("\n")[0]
        raise LowcalError(f"{reason}; use the CPU, another network, or --set deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
