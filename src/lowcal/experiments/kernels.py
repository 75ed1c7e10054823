"""Which kernels a GPU runs: the fastest, or those that give the same figures bit for bit; TF32 where asked."""

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
    """Within it cuDNN tries its algorithms for each size of convolution and keeps the fastest; then all is as before.

    Args:
        deterministic: torch uses no algorithm whose result changes from run to run instead.
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
