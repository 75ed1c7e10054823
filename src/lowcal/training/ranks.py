"""The processes that train one network together, as one of them sees them: the only place that asks torchrun.

With one process each call does nothing, so that no other code has to tell the two cases apart.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from lowcal.data import Share
from lowcal.errors import LowcalError
from lowcal.training.random_state import RandomState

# A process that ends is noticed at once, by its connections; this is for one that hangs, and must be longer than it
# takes the main process to read all data or to write a checkpoint.
PATIENCE = timedelta(minutes=30)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")


class LostError(LowcalError):
    """Another process of the run has ended or does not answer."""


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


class Ranks:
    """A process that trains alone.

    Args:
        device: where it trains.
        launch: as it was started.

    Attributes:
        rank: its number among all processes.
        world: the number of processes.
        share: its share of each mini-batch.
    """

    def __init__(self, device: torch.device | None = None, launch: Launch = Launch()) -> None:
        self.device = device or torch.device("cpu")
        self.launch = launch
        self.rank, self.world = launch.rank, launch.world
        self.share = Share(self.rank, self.world)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and shows."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sums of `values`, which are on the device and may be overwritten, over the processes."""
        return values

    def most(self, value: int) -> int:
        """The largest `value` of all processes; the host waits."""
        return value

    def poll(self, value: int) -> int:
        """The largest `value` that a process gave in the call before this one, or alone in this one.

        It is to be called equally often by all; none waits longer than for the others to have called it once before.
        """
        return value

    def wait(self) -> None:
        """Returns when all processes have called it."""

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Gives `tensors` the main process's values."""

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make`, called by the main process alone, gives: tensors and plain values, on the processor.

        Raises:
            LowcalError: that `make` raised, by all processes.
        """
        return make()

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """One process of each machine goes through the context before the machine's others."""
        yield

    def own_draws(self) -> Any:
        """A context in which torch's generators are this process's own; after it they go on alike in all."""
        return nullcontext()


class ManyRanks(Ranks):
    """One of several processes; torch's process group is initialised."""

    def __init__(self, device: torch.device, launch: Launch) -> None:
        super().__init__(device, launch)
        # A group of its own, on the processor whatever the device: its calls may come in any order among those of
        # training, and no GPU is waited for.
        self._desk: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[assignment]
        self._polled: tuple[Tensor, Any] | None = None

    def sum(self, values: Tensor) -> Tensor:
        """As `Ranks` says; on a GPU no host waits."""
        dist.all_reduce(values)
        return values

    def most(self, value: int) -> int:
        """As `Ranks` says."""
        largest = torch.tensor(max(value, self._answer()))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._desk)
        return int(largest)

    def poll(self, value: int) -> int:
        """As `Ranks` says."""
        answer = self._answer()
        if not answer:
            asked = torch.tensor(value)
            self._polled = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._desk, async_op=True)
        return answer

    def wait(self) -> None:
        """As `Ranks` says."""
        self.most(0)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """As `Ranks` says."""
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def from_main(self, make: Callable[[], T]) -> T:
        """As `Ranks` says."""
        if self.is_main:
            try:
                value = make()
            except LowcalError as error:
                self._send((None, str(error)))
                raise
            self._send((value, None))
            return value
        received, message = self._receive()
        if message is not None:
            raise LowcalError(message)
        return received

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """As `Ranks` says."""
        if self.launch.local_rank == 0:
            yield
            self.wait()
        else:
            self.wait()
            yield

    @contextmanager
    def own_draws(self) -> Iterator[None]:
        """As `Ranks` says."""
        seed = int(torch.randint(2**62, ()))
        with RandomState(seed + self.rank, self.device).entered():
            yield

    def _answer(self) -> int:
        """Of the poll under way; 0 if there is none."""
        if self._polled is None:
            return 0
        (asked, work), self._polled = self._polled, None
        work.wait()
        return int(asked)

    def _send(self, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        payload = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        dist.broadcast(torch.tensor(len(payload)), src=0, group=self._desk)
        dist.broadcast(payload, src=0, group=self._desk)

    def _receive(self) -> Any:
        size = torch.tensor(0)
        dist.broadcast(size, src=0, group=self._desk)
        payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._desk)
        return torch.load(io.BytesIO(payload.numpy().tobytes()), map_location="cpu", weights_only=True)


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


def is_spokesman() -> bool:
    """Whether this process is the one that says how the run ended: the first to ask, but rather the main one."""
    launch = Launch.read()
    if launch.world == 1:
        return True
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
    # Gloo's errors have no class of their own.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "nccl"))
