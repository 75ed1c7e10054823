"""This process: how torchrun started it, whether another one has ended, and how it keeps freed memory.

Importing this file does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from typing import Self

from lowcal.errors import LowcalError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


@dataclass(frozen=True)
class Launch:
    """What torchrun tells this process.

    Attributes:
        rank: its number among all `world` processes of the run.
        local_rank: its number among the `local_world` processes on this machine.
        restarts: how often the agent of this machine has restarted the processes.
        may_restart: whether torchrun restarts the processes if one of them ends.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    restarts: int = 0
    may_restart: bool = False

    @classmethod
    def read(cls) -> Self:
        """Read it from the environment; a process that was started without torchrun is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        if not all(name in os.environ for name in names[:2]):
            return cls()
        rank, world, local_rank, local_world, restarts = (os.environ.get(name) for name in names)
        max_restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        return cls(
            int(rank or 0),
            int(world or 1),
            int(local_rank or rank or 0),
            int(local_world or world or 1),
            int(restarts or 0),
            int(max_restarts) > 0,
        )


ALONE = Launch()


class LostError(LowcalError):
    """Another process of the run has ended or does not answer."""


def reports_end() -> bool:
    """Whether this process prints how the run ended: rank 0 if it is alive, else the first one that asks."""
    launch = Launch.read()
    if launch.world == 1:
        return True
    import torch.distributed as dist  # takes seconds, and a single process does not need it

    if not dist.is_initialized():
        return launch.rank == 0
    if launch.rank > 0:
        time.sleep(1)  # rank 0 reports a mistake that all processes have found
    try:
        return dist.distributed_c10d._get_default_store().add("lowcal/said", 1) == 1
    except RuntimeError:  # rank 0 held the store and has ended
        return False


def is_lost(error: RuntimeError) -> bool:
    """Whether `error` means that another process of the run has ended or does not answer."""
    if Launch.read().world == 1:
        return False
    import torch.distributed as dist

    # Gloo's errors have no class of their own.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "nccl"))


def keep_freed_memory() -> bool:
    """Make the C library keep the memory that this process frees; the peak does not change.

    By default glibc returns large blocks to the system. Each training step on the CPU then asks for them again, and the
    system clears every page. torch takes its CPU memory from glibc.

    Returns:
        Whether the C library supports this. If not, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_MAX, 0))
