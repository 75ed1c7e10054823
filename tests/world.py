"""Several processes that train together. Where no GPU is in use they are forked, so that torch is loaded only once."""

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch._dynamo  # DDP needs it, which takes seconds: loaded here once, not in each process

from lowcal.training.distributed import joined
from lowcal.training.process import Launch

CPU = torch.device("cpu")


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would tell process `rank` of `world` on one machine."""
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def processes(*, cuda: bool = False) -> BaseContext:
    """What starts a test's processes. Once a GPU is in use, by an earlier test too, and with `cuda`, none is forked."""
    return multiprocessing.get_context("spawn" if cuda or torch.cuda.is_initialized() else "fork")


def together(world: int, task: Callable[..., Any], *arguments: Any, cuda: bool = False) -> None:
    """Calls `task(ranks, *arguments)` in each of `world` processes, on a GPU each if `cuda`; none may fail."""
    assert apart(world, _joined, cuda, task, *arguments, cuda=cuda) == [0] * world


def apart(world: int, task: Callable[..., int | None], *arguments: Any, cuda: bool = False) -> list[int | None]:
    """Calls `task(*arguments)` in each of `world` processes; their exit codes, which it may return."""
    port, context = free_port(), processes(cuda=cuda)
    pickle.dumps((task, arguments))  # fails here too, not only on a GPU, where a process is spawned
    ranks = [context.Process(target=_child, args=(rank, world, port, task, arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def _joined(cuda: bool, task: Callable[..., Any], *arguments: Any) -> None:
    with joined(torch.device("cuda", Launch.read().local_rank) if cuda else CPU) as ranks:
        task(ranks, *arguments)


def _child(rank: int, world: int, port: int, task: Callable[..., int | None], arguments: Any) -> None:
    gc.freeze()  # the parent's objects, which need not be searched for garbage
    os.environ.update(environment(rank, world, port))
    torch.set_num_threads(1)
    code = 1
    try:
        code = task(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
