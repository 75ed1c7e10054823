"""The products of local updates on a second stream, next to the rest of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowcal.errors import LowcalError

HELD_BYTES = 256 * 2**20  # of operands, at most


class SecondStream(Protocol):
    """A queue of work on the device besides the present one."""

    def __init__(self, device: torch.device) -> None: ...

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Calls `function`. Its work begins when the present stream's is done so far; the present stream goes on."""

    def join(self) -> None:
        """Work of the present stream from now on begins when all work of this stream is done."""


class CudaStream:
    """A stream of CUDA; while a graph is recorded, a branch of the graph."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _second_stream(device)

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Calls `function` with this stream as the present one; memory that it asks for is this stream's."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return function(*args)

    def join(self) -> None:
        """The present stream waits for this one."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: cuBLAS keeps tens of MiB for each stream it has used."""
    return torch.cuda.Stream(device)


STREAM: type[SecondStream] = CudaStream


class _Operands(NamedTuple):
    """What a product reads, and how often it had been changed in place when the product began."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]


class _Product(NamedTuple):
    """An update that is still to be made, and who gets it."""

    update: Callable[..., Tensor]
    args: tuple[Any, ...]
    keep: Callable[[Tensor], None]


class Overlap:
    """Runs products on a second stream until the streams join, when the updates are applied.

    The products wait until all local layers have run (`start`), and so run next to the layers after the boundary: these
    are small and leave more of the device idle than the first ones do.

    A product reads its operands late, so they are kept until the streams join. When more than `limit` bytes are kept,
    the streams join earlier and the memory is free again. An operation in place, such as an activation right after a
    convolution, could overwrite what a product has still to read. Therefore the first step of each kind runs all
    products in line and finds the layers whose operands are overwritten before the join; their products stay in line.
    So does a product of a layer that runs again in the same step, whose updates are added up.

    Args:
        stream: the second stream.
        limit: the most bytes of operands that are kept.

    Attributes:
        in_line: layers whose operands are overwritten.
        most_held: the most bytes of operands that were kept so far.
    """

    def __init__(self, stream: SecondStream, limit: int) -> None:
        self.in_line: set[str] = set()
        self.most_held = 0
        self._stream, self._limit = stream, limit
        self._looks = False  # whether this step finds the layers that stay in line
        self._ran: set[str] = set()  # layers that this step has run
        self._operands: dict[str, _Operands] = {}
        self._sizes: dict[int, int] = {}  # bytes of the operands' storages by address
        self._waiting: list[_Product] = []
        self._has_work = False  # whether the second stream has not been joined since its last work

    @contextmanager
    def step(self, *, first: bool) -> Iterator[None]:
        """The context of a step; `first` if it is the first one of its kind."""
        self._looks = first
        try:
            yield
            self.join()  # also where no update was applied
        finally:  # also after an error, when nothing of the step counts
            self._ran.clear()
            self._let_go()

    def run(
        self,
        name: str,
        keep: Callable[[Tensor], None],
        update: Callable[..., Tensor],
        layer: nn.Module,
        a: Tensor,
        z: Tensor,
    ) -> None:
        """Makes the update of the layer `name`, now or later, and gives it to `keep`; read it after `join` only."""
        storages = [tensor.untyped_storage() for tensor in (a, z)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        if name in self._ran or sum((self._sizes | sizes).values()) > self._limit:
            self.join()
        if name in self._ran or sum(sizes.values()) > self._limit:
            keep(update(layer, a, z))
            return
        self._ran.add(name)
        self._sizes |= sizes  # in line too, so that the streams join at the same layers in all steps
        if name not in self.in_line:
            self._operands[name] = _Operands((a, z), (a._version, z._version))
            self.most_held = max(self.most_held, sum(self._sizes.values()))
            if not self._looks:
                self._waiting.append(_Product(update, (layer, a, z), keep))
                return
        keep(update(layer, a, z))

    @torch.no_grad()
    def start(self) -> None:
        """The products that wait begin, on the second stream; call it in the forward pass that they belong to."""
        for update, args, keep in self._waiting:
            self._has_work = True
            keep(self._stream.run(update, *args))
        self._waiting.clear()

    def join(self) -> None:
        """Waits for the second stream, on the device only.

        Raises:
            LowcalError: operands were overwritten that were not in the first step of the kind.
        """
        self.start()
        if self._has_work:
            self._stream.join()
        changed = [
            name
            for name, (tensors, versions) in self._operands.items()
            if any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True))
        ]
        self._let_go()
        if self._looks:
            self.in_line.update(changed)
        elif changed:
            raise LowcalError(
                f"the network overwrote the input or output of '{changed[0]}' in place, but not in its first step; "
                "use the step 'graphed'"
            )

    def _let_go(self) -> None:
        self._waiting.clear()
        self._operands.clear()
        self._sizes.clear()
        self._has_work = False
