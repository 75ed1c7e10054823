"""The fast step for any training loop: `make_step`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowcal.arguments import bare_network, bare_optimizers, is_controlled
from lowcal.errors import LowcalError, is_count, is_number, nearest
from lowcal.local import LoCal
from lowcal.overlap import Overlap
from lowcal.parallel import DistributedLoCal
from lowcal.steps.graphed import EAGER_STEPS
from lowcal.steps.modes import STEPS, build_step, candidates, find_step
from lowcal.steps.step import PRECISIONS, Step, StepOptions, is_out_of_memory


def make_step(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: Callable[[Any, Tensor], Tensor],
    local: LoCal | None = None,
    mode: str = "auto",
    *,
    scaler: GradScaler | None = None,
    max_norm: float | None = None,
    accumulate: int = 1,
) -> TrainingStep:
    """The body of a training loop as one fast call: ``loss = step(inputs, targets)``.

    A call computes the loss, its gradients, local updates if there are any, and steps the optimizer. On a GPU the whole
    step is recorded as a CUDA graph and replayed, which saves the launches that small networks wait for. When the
    boundary has moved, or anything else that the recorded step depends on has changed (settings of the optimizer, a
    loaded state, which parameters learn, training or evaluation mode of a module), the step is built again by itself.

    Learning-rate schedulers work as usual. Call the step within `torch.autocast` for mixed precision.

    Args:
        model: the network, or `DistributedLoCal` or DDP around it, which run eagerly.
        optimizer: of its parameters, or a list of several. To be recorded, SGD, Adam and AdamW need ``fused=True``
            (Adam and AdamW: or ``capturable=True``).
        loss_fn: the mean loss of a mini-batch, from the network's output and the targets.
        local: the controller of the network; None: plain training.
        mode: "eager", "compiled" (blocks by `torch.compile`), "graphed" (a CUDA graph), "graphed-compiled",
            "graphed-overlapped" (a CUDA graph with local updates on a second stream), or "auto": "graphed" where that
            is possible, else "eager".
        scaler: for float16.
        max_norm: gradients with a larger norm over all parameters are scaled down to it.
        accumulate: computes each mini-batch in so many parts, one after another, with less memory.

    Returns:
        A function of the network's inputs and the targets, tensors whose first dimension is the mini-batch's. It
        returns the mean loss, 0-d and without graph, on the device. Nothing waits for the device.

    Raises:
        LowcalError: the mode does not apply to the device, the optimizer or the network; `local` controls another
            network, or is missing; or an argument is out of range. Nothing is changed then.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = make_step(model, optimizer, nn.functional.cross_entropy)
        >>> step(torch.ones(3, 4), torch.tensor([0, 1, 1])).shape, step.mode
        (torch.Size([]), 'eager')
    """
    if mode not in (*STEPS, "auto"):
        raise LowcalError(f"make_step: there is no mode {mode!r}{nearest(mode, [*STEPS, 'auto'])}")
    if not callable(loss_fn):
        raise LowcalError(f"make_step: loss_fn is {loss_fn!r}; give a function such as F.cross_entropy")
    if max_norm is not None and not (is_number(max_norm) and max_norm > 0):
        raise LowcalError(f"make_step: max_norm is {max_norm!r}; give a number above 0, or None")
    if not is_count(accumulate):
        raise LowcalError(f"make_step: accumulate is {accumulate!r}; give a whole number, at least 1")
    is_wrapped = isinstance(model, DistributedLoCal | DistributedDataParallel)
    network = bare_network(model.module if is_wrapped else model)
    if local is not None and local.model is not network:
        raise LowcalError("make_step: local controls another model; give the model that LoCal was built with")
    if local is None and is_controlled(network):
        raise LowcalError("make_step: the model learns under a LoCal; give it as make_step(..., local=...)")
    if is_wrapped and mode not in ("auto", "eager"):
        raise LowcalError(f"make_step: mode={mode!r} is for one process; use 'eager' with {type(model).__name__}")
    devices = {parameter.device for parameter in network.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise LowcalError(f"make_step: {type(network).__name__} is on {found}; it must be on one device")
    options = StepOptions(devices.pop(), scaler=scaler, loss_fn=loss_fn, max_norm=max_norm, accumulate=accumulate)
    optimizers, learning = bare_optimizers(optimizer), _Controlled(local)
    if mode != "auto":
        find_step(mode).check(network, optimizers, learning, options)
    return TrainingStep(model, network, optimizers, learning, "eager" if is_wrapped else mode, options)


class TrainingStep:
    """What `make_step` returns: a training step that is built again when what it depends on has changed.

    Attributes:
        mode: of the present step; "auto" before the first one.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        optimizers: tuple[Optimizer, ...],
        learning: _Controlled,
        mode: str,
        options: StepOptions,
    ) -> None:
        self.mode = mode
        self._model, self._network, self._optimizers, self._learning = model, network, optimizers, learning
        self._asked, self._options = mode, options
        self._parameters = list(network.parameters())
        self._modules = list(network.modules())
        self._step: Step | None = None
        self._built_for: tuple[Any, ...] = ()

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last call left the network unchanged because a gradient was not finite, 0-d on the device.

        None if that cannot happen.
        """
        return None if self._step is None else self._step.skipped

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch: the network's inputs, then the targets.

        Raises:
            LowcalError: the mini-batch is not on the network's device, or the step cannot be recorded.
        """
        device = self._options.device
        for given in batch:
            if not isinstance(given, Tensor) or given.device != device:
                where = f"a tensor on {given.device}" if isinstance(given, Tensor) else type(given).__name__
                raise LowcalError(f"the step got {where}; give tensors on {device}, where the network is")
        precision = _ambient_precision(device)
        torch.clear_autocast_cache()  # it holds cast weights, which each step changes, while the context lasts
        with torch.autocast(device.type, enabled=False):  # for the backward pass and the optimizer
            present = (precision, *self._dependencies())
            if self._step is None or present != self._built_for:
                self._step = None  # releases the memory of graphs
                self._step = self._build(batch, replace(self._options, precision=precision, batch=len(batch[0])))
                self._built_for = (precision, *self._dependencies())
            loss = self._step(*batch).clone()  # a recorded step overwrites it
        torch.clear_autocast_cache()
        return loss

    def _dependencies(self) -> tuple[Any, ...]:
        """What a compiled or recorded step depends on. The method's phases and learning rates are not part of it."""
        opened = {id(parameter) for parameter in self._learning.opened()}
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return (
            self._learning.generation,
            [(p.data_ptr(), p.requires_grad or id(p) in opened) for p in self._parameters],
            [module.training for module in self._modules],
            [id(optimizer.state) for optimizer in self._optimizers],  # another one after `load_state_dict`
            [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups],
        )

    def _build(self, batch: Sequence[Tensor], options: StepOptions) -> Step:
        self._states = [optimizer.state for optimizer in self._optimizers]  # kept, so that no other has the same id
        if self._asked == "auto":
            modes = reversed(candidates(options.device))
            self.mode = next(mode for mode in modes if mode == "eager" or self._runs(mode, batch, options))
        model = self._network if "compiled" in self.mode else self._model
        return build_step(self.mode, model, self._optimizers, self._learning, options)

    def _runs(self, mode: str, batch: Sequence[Tensor], options: StepOptions) -> bool:
        """Whether the step runs in `mode`: tried on copies, in which local updates are off."""
        try:
            find_step(mode).check(self._network, self._optimizers, self._learning, options)
            network, optimizers, scaler = copy.deepcopy((self._network, self._optimizers, options.scaler))
            trial = build_step(mode, network, optimizers, _Controlled(None), replace(options, scaler=scaler))
            with torch.random.fork_rng([options.device] if options.device.type == "cuda" else []):
                for _ in range(EAGER_STEPS):  # the last of them refuses to read from the device
                    trial(*batch)
        except Exception as error:
            is_known = isinstance(error, LowcalError | TypeError | NotImplementedError) or is_out_of_memory(error)
            if not is_known and "deepcopy" not in str(error):
                raise
            return False
        return True


class _Controlled:
    """The `Learning` of a network under `local`, or of one that only the optimizer trains."""

    name = "LoCal"
    unreplayable = None

    def __init__(self, local: LoCal | None) -> None:
        self._layers = None if local is None else local._local_layers

    @property
    def generation(self) -> int:
        """How often the set of local layers has changed."""
        return 0 if self._layers is None else self._layers.generation

    @property
    def phase(self) -> int:
        """0 if the rule acts in the next step, else 1."""
        return 0 if self._layers is None else self._layers.phase

    def opened(self) -> list[nn.Parameter]:
        """The parameters that learn by the optimizer in some steps only."""
        return [] if self._layers is None else self._layers.opened()

    def penalty(self, loss: Tensor) -> None:
        """None."""

    def make_replayable(self, device: torch.device) -> None:
        """Keeps the length and sign of local steps on `device`."""
        if self._layers is not None:
            self._layers.make_replayable(device)

    def overlapped(self, overlap: Overlap) -> AbstractContextManager[None]:
        """Inside it, products of local updates run by `overlap`."""
        return nullcontext() if self._layers is None else self._layers.overlapped(overlap)

    def replayed(self) -> None:
        """Counts the step."""
        if self._layers is not None:
            self._layers.replayed()


def _ambient_precision(device: torch.device) -> str:
    """The precision of the autocast context around the call."""
    if not torch.is_autocast_enabled(device.type):
        return "float32"
    dtype = torch.get_autocast_dtype(device.type)
    for name, known in PRECISIONS.items():
        if known == dtype:
            return name
    raise LowcalError(f"the step runs under autocast to {dtype}; give torch.bfloat16 or torch.float16")
