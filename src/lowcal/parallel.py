"""Data-parallel training with a moving boundary: torch's DDP, rebuilt at each move, and sums of local updates."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError
from lowcal.hooks import Hook
from lowcal.local import LoCal


class DistributedLoCal(nn.Module):
    """Trains `model` on mini-batches that are split over all ranks, as DDP does, while the boundary of `local` moves.

    Call this module instead of the model. DDP reduces gradients only, and ``requires_grad`` must not change under it.
    So it is rebuilt in the forward pass after each move, and ``find_unused_parameters`` is never needed. The ranks'
    local updates are summed in one asynchronous all-reduce. It starts when the last local layer has run, and overlaps
    the rest of the forward and backward pass. Local layers that the optimizer trains in some steps (`Refresh`) have a
    second DDP, which is used in those steps only. The boundary depends on the mean of the losses that the ranks pass to
    ``local.end_epoch``, so that it is the same on all ranks.

    Args:
        model: the network, on this rank's device.
        local: its controller.
        ddp_options: further arguments of `torch.nn.parallel.DistributedDataParallel`.

    Raises:
        LowcalError: no process group is initialised, `local` controls another model, or ``find_unused_parameters`` or
            ``device_mesh`` is given.

    Example:
        >>> parallel = DistributedLoCal(model, local, device_ids=[rank])  # doctest: +SKIP
        >>> loss = criterion(parallel(images), labels)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, local: LoCal, **ddp_options: Any) -> None:
        super().__init__()
        if not (dist.is_available() and dist.is_initialized()):
            raise LowcalError(
                "DistributedLoCal: no process group is initialised; start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        if local.model is not model:
            raise LowcalError(
                "DistributedLoCal: local controls another model; build LoCal on the bare model, before it is wrapped"
            )
        if ddp_options.get("find_unused_parameters"):
            raise LowcalError(
                "DistributedLoCal: find_unused_parameters=True is never needed, since DDP is rebuilt at each move; "
                "leave it out"
            )
        if ddp_options.get("device_mesh") is not None:
            raise LowcalError(
                "DistributedLoCal: device_mesh is given, which local updates do not support; "
                "give its ranks as process_group=mesh.get_group()"
            )
        self.module = model
        self._controller = local
        self._local = local._local_layers
        self._options = ddp_options
        self._exchange = Exchange(ddp_options.get("process_group"))
        self._local.use_ranks(self._exchange)
        # A list hides DDP from nn.Module, which would register the network a second time.
        self._ddp = self._build(ddp_options)
        self._generation = self._local.generation

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass."""
        wrapped = self._reducers()[-1 if self._local.is_open else 0]
        self._local.updates.begin_forward()
        outputs = wrapped(*inputs, **keywords)
        self._local.updates.end_forward()
        return outputs

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside it, gradients and local updates are not summed: for all micro-batches of a step but the last."""
        with ExitStack() as stack:
            for reducer in self._reducers():
                stack.enter_context(reducer.no_sync())
            self._exchange.open = False
            try:
                yield
            finally:
                self._exchange.open = True

    def bytes_per_step(self) -> int:
        """Bytes of gradients and local updates that each rank sends for reduction, per step on average."""
        opened = set(self._local.opened())
        each_step = (p for p in self.module.parameters() if p.requires_grad and p not in opened)
        return _bytes(each_step) + _bytes(opened) // self._controller.rule.every + self._local.updates.bytes_per_step()

    def _reducers(self) -> list[DistributedDataParallel]:
        """DDP of the parameters that learn in each step, then of those that learn only in open steps."""
        if self._generation != self._local.generation:
            self._ddp.clear()
            gc.collect()  # the old reducers' hooks on the parameters go with them
            self._ddp = self._build({**self._options, "init_sync": False})  # the ranks are alike already
            self._generation = self._local.generation
        return self._ddp

    def _build(self, options: dict[str, Any]) -> list[DistributedDataParallel]:
        opened = self._local.opened()
        with _requiring_grad(opened, False):
            reducers = [DistributedDataParallel(self.module, **options)]
        if opened:
            # A communicator of its own here too, so that no order is needed between the two reducers' calls.
            options = {**options, "init_sync": False, "process_group": self._exchange.group}
            with _requiring_grad(opened, True):
                reducers.append(DistributedDataParallel(_Opened(opened, reducers[0]), **options))
        return reducers


def follow_ddp(local: LoCal, sums_gradients: Callable[[], bool]) -> list[RemovableHandle]:
    """Sums local updates over all ranks for a network under a DDP that another program built and keeps.

    That DDP needs ``find_unused_parameters=True``: with it, parameters may stop learning at a move.

    Args:
        local: the controller of the network.
        sums_gradients: whether the ranks' gradients are summed after the coming pass; False while they accumulate.

    Returns:
        The handles of the hooks on the network.
    """
    exchange, updates = Exchange(), local._local_layers.updates
    local._local_layers.use_ranks(exchange)

    def begin(*_: Any) -> None:
        exchange.open = sums_gradients()
        updates.begin_forward()

    def end(*_: Any) -> None:
        updates.end_forward()

    return [
        local.model.register_forward_pre_hook(Hook(begin)),
        local.model.register_forward_hook(Hook(end)),
    ]


class _Opened(nn.Module):
    """What DDP wraps to reduce the gradients of `parameters` only; calls go to `inner`."""

    def __init__(self, parameters: list[nn.Parameter], inner: nn.Module) -> None:
        super().__init__()
        self._held = nn.ParameterList(parameters)
        self._inner = [inner]  # a list, so that its parameters are not this module's

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self._inner[0](*inputs, **keywords)


@contextmanager
def _requiring_grad(parameters: list[nn.Parameter], required: bool) -> Iterator[None]:
    """Inside it, ``requires_grad`` of `parameters` is `required`."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, was_required in zip(parameters, before, strict=True):
            parameter.requires_grad_(was_required)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


class Exchange:
    """Communication of a controller with the other ranks: sums of local updates, means of numbers.

    Attributes:
        group: the ranks.
        open: whether updates are summed in this forward pass; False while gradients accumulate.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        # A communicator of its own: the order of its calls among DDP's may differ from rank to rank.
        ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
        self.group: dist.ProcessGroup = dist.new_group(ranks)  # type: ignore[assignment]
        self._works: list[dist.Work] = []
        self.open = True

    def start(self, updates: Mapping[int, Tensor], shapes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Starts summing `updates` over the ranks.

        Args:
            updates: this rank's dW by layer.
            shapes: a tensor like the dW of each layer that may have one on any rank; a missing one counts as zero.

        Returns:
            The sums, in at least single precision, which are complete after `wait`.
        """
        buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, like in shapes.items():
            buckets.setdefault((like.device, torch.promote_types(like.dtype, torch.float32)), []).append(index)
        sums: dict[int, Tensor] = {}
        for (device, dtype), members in buckets.items():
            sizes = [shapes[index].numel() for index in members]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            for index, view in zip(members, flat.split(sizes), strict=True):
                sums[index] = view.view(shapes[index].shape)
                if index in updates:
                    sums[index].copy_(updates[index])
            self._works.append(dist.all_reduce(flat, group=self.group, async_op=True))
        return sums

    def wait(self) -> None:
        """Waits for the sums (on a GPU: makes the current stream wait)."""
        for work in self._works:
            work.wait()
        self._works.clear()

    def mean(self, *values: float) -> list[float]:
        """The means of `values` over the ranks, the same on all."""
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        return (total / dist.get_world_size(self.group)).tolist()
