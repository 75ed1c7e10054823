"""How the processes that torchrun started find one another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
import torch.distributed as dist

from lowcal.training.launch import Launch, LostError, is_lost
from lowcal.training.ranks import PATIENCE, ManyRanks, Ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among those that torchrun started, or alone.

    Raises:
        LostError: another one ended, or does not answer.
    """
    launch = Launch.read()
    if launch.world == 1:
        yield Ranks(device, launch)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = _fresh_store(launch)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=PATIENCE)
        yield ManyRanks(device, launch)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise LostError("another process of the run has ended or does not answer") from error
    dist.destroy_process_group()


def _fresh_store(launch: Launch) -> Store:
    """A store without anything that processes wrote there before torchrun started them anew (torch 2.15 keeps that).

    The main process tells each other one a name that is new. An old greeting may lie where it looks for theirs; whoever
    has left it is no longer there, so it goes on answering until all have said that they heard.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    name = uuid4().hex
    if launch.rank:
        store.set(f"lowcal/greeting/{launch.rank}", name)
        answer = f"lowcal/answer/{name}"
        store.wait([answer], PATIENCE)
        attempt = store.get(answer).decode()
        store.set(f"lowcal/heard/{attempt}/{launch.rank}", "")
    else:
        attempt, end = name, time.monotonic() + PATIENCE.total_seconds()
        waiting = set(range(1, launch.world))
        while waiting:
            for rank in tuple(waiting):
                if store.check([f"lowcal/heard/{attempt}/{rank}"]):
                    waiting.remove(rank)
                elif store.check([f"lowcal/greeting/{rank}"]):
                    store.set(f"lowcal/answer/{store.get(f'lowcal/greeting/{rank}').decode()}", attempt)
            if time.monotonic() > end:
                raise LostError(f"process {min(waiting)} of the run does not come")
            time.sleep(0.01)
    return PrefixStore(f"lowcal/{attempt}", store)
