"""The processes that train one network together, as one of them sees them.

With one process each call does nothing, so other code need not distinguish the two cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from lowcal.data import Shard
from lowcal.errors import LowcalError
from lowcal.training.process import ALONE, Launch, LostError, is_lost
from lowcal.training.random_state import RandomState

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that ends is noticed at once, by its connections. This limit is for one that hangs. It must be longer than
# rank 0 takes to read all data or to write a checkpoint.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


class TrainingGroup:
    """The group of a process that trains alone.

    Args:
        device: the device of this process.
        launch: how this process was started.

    Attributes:
        rank: the number of this process in the group.
        world: the number of processes.
        shard: this process's part of each mini-batch.
    """

    def __init__(self, device: torch.device | None = None, launch: Launch = ALONE) -> None:
        self.device = device or torch.device("cpu")
        self.launch = launch
        self.rank, self.world = launch.rank, launch.world
        self.shard = Shard(self.rank, self.world)

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes the files and shows the progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sums of `values` over the processes. `values` are on the device and may be overwritten."""
        return values

    def max(self, value: int) -> int:
        """The largest `value` of all processes; the host waits."""
        return value

    def poll(self, value: int) -> int:
        """The largest `value` that a process passed to the previous call, or with one process to this call.

        All processes must call it the same number of times. A process waits only until the others have made the
        previous call.
        """
        return value

    def barrier(self) -> None:
        """Returns when all processes have called it."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the values of rank 0 into `tensors`."""

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, which alone calls it: tensors on the CPU and plain values.

        Raises:
            LowcalError: `make` raised it; then all processes raise it.
        """
        return make()

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One process of each machine passes through the context before the others of that machine."""
        yield

    def own_random(self) -> AbstractContextManager[None]:
        """Within it torch's random generators differ between processes; after it they are equal again."""
        return nullcontext()


class DistributedGroup(TrainingGroup):
    """The group of one of several processes; torch's process group is initialised."""

    def __init__(self, device: torch.device, launch: Launch) -> None:
        super().__init__(device, launch)
        # A group of its own on the CPU: its calls may come in any order among those of training, and no GPU waits.
        self._control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=TIMEOUT)  # type: ignore[assignment]
        self._pending: tuple[Tensor, Any] | None = None  # of `poll`

    def sum(self, values: Tensor) -> Tensor:
        """As `TrainingGroup.sum`; on a GPU the host does not wait."""
        dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """As `TrainingGroup.max`."""
        largest = torch.tensor(max(value, self._finish_poll()))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control)
        return int(largest)

    def poll(self, value: int) -> int:
        """As `TrainingGroup.poll`."""
        answer = self._finish_poll()
        if not answer:
            largest = torch.tensor(value)
            work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control, async_op=True)
            self._pending = largest, work
        return answer

    def barrier(self) -> None:
        """As `TrainingGroup.barrier`."""
        self.max(0)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """As `TrainingGroup.broadcast`."""
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def from_main(self, make: Callable[[], T]) -> T:
        """As `TrainingGroup.from_main`."""
        message: list[Any] = [None, None]  # what `make` returned, the text of its error
        if self.is_main:
            try:
                message[0] = make()
            except LowcalError as error:
                dist.broadcast_object_list([None, str(error)], src=0, group=self._control)
                raise
        dist.broadcast_object_list(message, src=0, group=self._control)
        value, error_text = message
        if error_text is not None:
            raise LowcalError(error_text)
        return value

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """As `TrainingGroup.local_main_first`."""
        if self.launch.local_rank == 0:
            yield
            self.barrier()
        else:
            self.barrier()
            yield

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """As `TrainingGroup.own_random`."""
        seed = int(torch.randint(2**62, ()))
        with RandomState(seed + self.rank, self.device).entered():
            yield

    def _finish_poll(self) -> int:
        """The result of the pending poll; 0 if there is none."""
        if self._pending is None:
            return 0
        (largest, work), self._pending = self._pending, None
        work.wait()
        return int(largest)


@contextmanager
def joined(device: torch.device) -> Iterator[TrainingGroup]:
    """The group of the processes that torchrun started, or of this process alone.

    Raises:
        LostError: another process has ended or does not answer.
    """
    launch = Launch.read()
    if launch.world == 1:
        yield TrainingGroup(device, launch)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = _fresh_store(launch)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=TIMEOUT)
        yield DistributedGroup(device, launch)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise LostError("another process of the run has ended or does not answer") from error
    dist.destroy_process_group()


def _fresh_store(launch: Launch) -> Store:
    """A store without the entries of earlier attempts, which torchrun's store keeps over a restart (torch 2.15).

    A prefix by TORCHELASTIC_RESTART_COUNT would not do: each machine's agent counts for itself, so that the counts of
    two machines may differ. Instead rank 0 sends the name of this attempt to each other process, addressed to a random
    name which that process has put into the store. The store may still hold such a name of a process that has ended, so
    rank 0 answers until all have acknowledged.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    name = uuid4().hex
    if launch.rank:
        store.set(f"lowcal/name/{launch.rank}", name)
        answer = f"lowcal/attempt/{name}"
        store.wait([answer], TIMEOUT)
        attempt = store.get(answer).decode()
        store.set(f"lowcal/acknowledged/{attempt}/{launch.rank}", "")
    else:
        attempt, end = name, time.monotonic() + TIMEOUT.total_seconds()
        waiting = set(range(1, launch.world))
        while waiting:
            for rank in tuple(waiting):
                if store.check([f"lowcal/acknowledged/{attempt}/{rank}"]):
                    waiting.remove(rank)
                elif store.check([f"lowcal/name/{rank}"]):
                    store.set(f"lowcal/attempt/{store.get(f'lowcal/name/{rank}').decode()}", attempt)
            if time.monotonic() > end:
                raise LostError(f"process {min(waiting)} of the run does not come")
            time.sleep(0.01)
    return PrefixStore(f"lowcal/{attempt}", store)
