"""The processes that train one network together, as one of them sees them.

With one process each call does nothing, so that no other code has to tell the two cases apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowcal.data import Shard
from lowcal.errors import LowcalError
from lowcal.training.launch import ALONE, Launch
from lowcal.training.random_state import RandomState

# A process that ends is noticed at once, by its connections; this is for one that hangs, and must be longer than it
# takes the main process to read all data or to write a checkpoint.
PATIENCE = timedelta(minutes=30)

T = TypeVar("T")


class Ranks:
    """A process that trains alone.

    Args:
        device: where it trains.
        launch: as it was started.

    Attributes:
        rank: its number among all processes.
        world: the number of processes.
        shard: its shard of each mini-batch.
    """

    def __init__(self, device: torch.device | None = None, launch: Launch = ALONE) -> None:
        self.device = device or torch.device("cpu")
        self.launch = launch
        self.rank, self.world = launch.rank, launch.world
        self.shard = Shard(self.rank, self.world)

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
