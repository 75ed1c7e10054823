"""How torchrun started this process, and whether another one has ended: the only place that asks torchrun."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Self

from lowcal.errors import LowcalError


@dataclass(frozen=True)
class Launch:
    """What torchrun tells this process.

    Attributes:
        rank: its number among all `world` processes of the run.
        local_rank: its number among the `local_world` on this machine.
        restarts: how often all have been started anew.
        may_restart: whether they would be, if one ended.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    restarts: int = 0
    may_restart: bool = False

    @classmethod
    def read(cls) -> Self:
        """As the environment says; a process that was started without torchrun is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        if not all(name in os.environ for name in names[:2]):
            return cls()
        rank, world, local_rank, local_world, restarts = (os.environ.get(name) for name in names)
        most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        return cls(
            int(rank or 0),
            int(world or 1),
            int(local_rank or rank or 0),
            int(local_world or world or 1),
            int(restarts or 0),
            int(most) > 0,
        )


ALONE = Launch()


class LostError(LowcalError):
    """Another process of the run has ended or does not answer."""


def is_spokesman() -> bool:
    """Whether this process is the one that says how the run ended: the first to ask, but rather the main one."""
    launch = Launch.read()
    if launch.world == 1:
        return True
    import torch.distributed as dist  # a program that ends at its start need not wait for it

    if not dist.is_initialized():
        return launch.rank == 0
    if launch.rank > 0:
        time.sleep(1)  # what is wrong in all is said by the main process
    try:
        return dist.distributed_c10d._get_default_store().add("lowcal/said", 1) == 1
    except RuntimeError:  # the main process's own store has ended with it
        return False


def is_lost(error: RuntimeError) -> bool:
    """Whether `error` is that another process of the run has ended or does not answer."""
    if Launch.read().world == 1:
        return False
    import torch.distributed as dist

    # Gloo's errors have no class of their own.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "nccl"))
