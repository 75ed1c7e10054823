"""How torch computes: which kernels a GPU runs, the CPU threads, and where images have their channels in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from lowcal.errors import LowcalError
from lowcal.experiments.recipe import Recipe


def kernels_of(recipe: Recipe) -> AbstractContextManager[None]:
    """As `kernels`, for a run of `recipe`."""
    return kernels(deterministic=recipe.deterministic, tf32=recipe.tf32)


@contextmanager
def kernels(*, deterministic: bool = False, tf32: bool | None = None) -> Iterator[None]:
    """Within it cuDNN tries its algorithms for each size of convolution and keeps the fastest.

    Args:
        deterministic: torch instead uses only algorithms whose result does not change from run to run.
        tf32: whether products of float32 numbers may round their factors to 10 bits of fraction, which newer GPUs
            multiply many times faster; None: torch's own choice, which is yes in convolutions and no in linear layers.

    Raises:
        LowcalError: an operation of the network has no deterministic algorithm on this device.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic = True
    if tf32 is not None:
        cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    except RuntimeError as error:
        if not deterministic or "deterministic" not in str(error):
            raise
        reason = str(error).partition(", but")[0].partition("\n")[0]
        raise LowcalError(f"{reason}; use the CPU, another network, or --set deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within it torch computes with `count` CPU threads (None: its own choice)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def puts_channels_last(asked: bool | None, device: torch.device, precision: str) -> bool:
    """Whether the channels of images and weights come last in memory: as `asked`, or with None where steps are faster.

    Channels last is faster on a CPU, as measured (docs/performance.md, "Memory format"), and on a GPU in half
    precision, whose matrix units need this order. On a GPU in single precision, which was not measured, they come
    first, which is torch's default.
    """
    if asked is not None:
        return asked
    return device.type != "cuda" or precision != "float32"
