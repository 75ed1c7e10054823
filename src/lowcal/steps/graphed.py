"""The whole step as a CUDA graph: one launch for augmentation, forward, local updates, backward and optimizer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lowcal.drop_path import check_computes_all
from lowcal.errors import LowcalError
from lowcal.steps.compiled import CompiledStep
from lowcal.steps.optimizing import is_fused
from lowcal.steps.overlapped import OverlappedStep
from lowcal.steps.step import EagerStep, Learning, StepOptions, is_out_of_memory


class Graphs(Protocol):
    """Records the work that a function gives the device, and replays it without running the function."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def check(device: torch.device) -> None:
        """Refuses a device that cannot record."""

    def aside(self, *, strict: bool = False) -> AbstractContextManager[None]:
        """A context in which work runs as it does while recording; work must run there once before it is recorded.

        Args:
            strict: whether reading from the device, which cannot be recorded, is an error.
        """

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Runs `body` without doing its work; returns a function that does the work each time it is called."""


class CudaGraphs:
    """CUDA graphs. Their memory comes from one pool and is kept until all of them are deleted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def check(device: torch.device) -> None:
        """Refuses all devices except CUDA devices."""
        if device.type != "cuda":
            raise LowcalError(
                f"the step 'graphed' needs a CUDA device, and this network is on {device}; use 'eager' or 'compiled'"
            )

    @contextmanager
    def aside(self, *, strict: bool = False) -> Iterator[None]:
        """The stream that records. Autograd binds a parameter's gradient to the stream of its first backward pass."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream), _reading_refused() if strict else nullcontext():
            yield
        present.wait_stream(self._stream)

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Captures `body`; other threads, such as those that load images, may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            body()
        return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all graphs of the process: cuBLAS keeps tens of MiB for each stream it has used."""
    return torch.cuda.Stream(device)


@contextmanager
def _reading_refused() -> Iterator[None]:
    """Within it waiting for the device is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


GRAPHS: type[Graphs] = CudaGraphs
EAGER_STEPS = 2  # of each kind, before it is recorded
MOST_GRAPHS = 16  # each keeps memory; further kinds of step run eagerly

_Kind = tuple[tuple[tuple[torch.Size, torch.dtype], ...], int]  # of the mini-batch's tensors, `Learning.phase`


@dataclass(frozen=True)
class _Recorded:
    """A step that can be replayed: it reads `batch`, and writes `loss` and `skipped`."""

    replay: Callable[[], None]
    batch: tuple[Tensor, ...]
    loss: Tensor
    skipped: Tensor | None


class GraphedStep:
    """The eager step, recorded and replayed; build another one after each move.

    There is a graph for each shape of mini-batch and each phase (`Learning.phase`). The first such step runs eagerly;
    this is all the warm-up that recording needs, so nothing has to be undone. The second also runs eagerly, and reading
    from the device is an error in it: such an error while recording would leave torch in an invalid state. The third is
    recorded and replayed. What Python does in a step happens once per step: in an eager step, while recording, or in
    `Learning.replayed`. Learning rates and the length of local steps are on the device, so epochs share graphs. Other
    settings of the optimizers are recorded as they are.

    The loss that a call returns is overwritten by the next call.

    Raises:
        LowcalError: see `check`.
    """

    kind: ClassVar[type[EagerStep | CompiledStep]] = EagerStep  # of the steps that are recorded

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions
    ) -> None:
        self.check(model, optimizers, learning, options)
        device = options.device
        self._step = self.kind(model, optimizers, learning, options)
        self._learning = learning
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._graphs = GRAPHS(device)
        self._rates = [torch.zeros((), device=device) for _ in self._groups]
        self._rates_set: list[float] = []
        self._has_run: Counter[_Kind] = Counter()
        self._recorded: dict[_Kind, _Recorded] = {}
        self._skipped: Tensor | None = None
        learning.make_replayable(device)

    @classmethod
    def check(cls, model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions) -> None:
        """Refuses a device without graphs, steps that differ, and an optimizer that a graph cannot hold."""
        GRAPHS.check(options.device)
        check_computes_all(model, "graphed")
        cls.kind.check(model, optimizers, learning, options)
        if learning.unreplayable is not None:
            raise LowcalError(f"the step 'graphed' cannot run {learning.name}: {learning.unreplayable}; use 'eager'")
        for optimizer in optimizers:
            stays_on_device = is_fused(optimizer) or (
                isinstance(optimizer, Adam)
                and not (options.scaler or options.guard)
                and all(group["capturable"] for group in optimizer.param_groups)
            )
            if not (isinstance(optimizer, SGD | Adam) and stays_on_device):
                raise LowcalError(
                    f"the step 'graphed' cannot run {type(optimizer).__name__} as it is; build SGD, Adam or AdamW with "
                    "fused=True, or use the step 'eager'"
                )

    @property
    def skipped(self) -> Tensor | None:
        """See `Step`."""
        return self._skipped

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch; see `Step`.

        Raises:
            LowcalError: the step cannot be recorded, as when the network reads from the device.
        """
        self._set_rates()
        key = tuple((tensor.shape, tensor.dtype) for tensor in batch), self._learning.phase
        is_new = key not in self._recorded
        if self._has_run[key] < EAGER_STEPS or (is_new and len(self._recorded) >= MOST_GRAPHS):
            return self._run_eagerly(key, batch)
        if is_new:
            self._recorded[key] = self._record(batch)
        step = self._recorded[key]
        for fixed, tensor in zip(step.batch, batch, strict=True):
            fixed.copy_(tensor)
        step.replay()
        if not is_new:
            self._learning.replayed()
        self._skipped = step.skipped
        return step.loss

    def _run_eagerly(self, key: _Kind, batch: tuple[Tensor, ...]) -> Tensor:
        is_strict = self._has_run[key] == 1
        named = _unrecordable() if is_strict else nullcontext()
        with named, self._graphs.aside(strict=is_strict), self._rates_on_device():
            loss = self._step(*batch)
        self._has_run[key] += 1
        self._skipped = self._step.skipped
        return loss

    def _record(self, batch: tuple[Tensor, ...]) -> _Recorded:
        batch = tuple(tensor.clone() for tensor in batch)
        losses: list[Tensor] = []
        with _unrecordable(), self._rates_on_device():
            replay = self._graphs.record(lambda: losses.append(self._step(*batch)))
        return _Recorded(replay, batch, losses[0], self._step.skipped)

    def _set_rates(self) -> None:
        rates = [float(group["lr"]) for group in self._groups]
        if rates != self._rates_set:
            for tensor, rate in zip(self._rates, rates, strict=True):
                tensor.fill_(rate)
            self._rates_set = rates

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Within it the optimizers read their learning rates from the device, as graphs do."""
        before = [group["lr"] for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(self._groups, before, strict=True):
                group["lr"] = rate


class CompiledGraphedStep(GraphedStep):
    """The step with compiled blocks, recorded and replayed: compiling fuses what stands between the products."""

    kind = CompiledStep


class OverlappedGraphedStep(GraphedStep):
    """The step with the products of local updates on a second stream, recorded and replayed."""

    kind = OverlappedStep


@contextmanager
def _unrecordable() -> Iterator[None]:
    """Turns torch's error while recording into a LowcalError of one line."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0]
        raise LowcalError(
            f"the step cannot be recorded as a CUDA graph ({first_line}); use the step 'eager' or 'compiled'"
        ) from error
