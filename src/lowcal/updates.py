"""Local updates: made in the forward pass, applied after the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.discovery import runs_twice
from lowcal.errors import LowcalError
from lowcal.hooks import CaptureHook, Hook, LayerHook, UpdateHook
from lowcal.overlap import Overlap
from lowcal.pending import PendingUpdates
from lowcal.products import ProductCapture, has_plain_forward
from lowcal.rules import Rule
from lowcal.step_times import StepClock

if TYPE_CHECKING:
    from lowcal.parallel import Exchange


class _LocalLayer(NamedTuple):
    """A layer that learns locally, and the hook that makes its updates."""

    name: str
    module: nn.Module
    hook: UpdateHook


class LocalUpdates:
    """Makes the updates of a network's local layers in the forward pass, and applies them after the step.

    A hook on each of these layers computes its dW (`Rule.update`) when the forward pass runs the layer. `apply`, called
    right after ``optimizer.step()``, changes all their weights (`Rule.apply`). No step reads from the device.

    Layers are identified by their index in the order of execution.

    Args:
        model: the network.
        rule: what makes updates and applies them.

    Attributes:
        steps: optimizer steps since the first layer became local.
        epoch_counts: in this epoch: steps, steps in which the rule acts, steps that applied an update.
        handles: the hooks' handles.
        clock: measures the steps of this epoch.
    """

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        self.steps = 0
        self.epoch_counts = [0, 0, 0]
        self.handles: list[RemovableHandle] = []
        self.clock = StepClock()
        self._model, self._rule = model, rule
        self._pending = PendingUpdates(self._collect_compiled)
        self._layers: dict[int, _LocalLayer] = {}
        self._last: int | None = None  # the last local layer: when it has run, the pass has made all its updates
        self._ran: set[int] | None = None  # local layers that this forward pass has run; None outside of counted passes
        self._parameters: Sequence[nn.Parameter] = ()  # of the layers, the last layer's first
        self._pauses = 0
        self._overlap: Overlap | None = None
        self._step: float | Tensor = 0.0  # eta with its sign, for all layers or each; on the device for replayed steps
        self._skipped: Tensor = torch.zeros((), dtype=torch.int64)

    # Which layers learn

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Puts hooks on the network; call it before the first layer becomes local.

        Args:
            parameters: those of all layers and their followers, first layer to last.
        """
        if self._rule.collects:
            self._parameters = parameters[::-1]
            self.handles += [
                self._model.register_forward_pre_hook(Hook(self._begin_pass)),
                self._model.register_forward_hook(Hook(self._end_pass), always_call=True),
            ]

    def watch_backward(self, parameter: nn.Parameter) -> None:
        """Observes the gradient of `parameter`, which the optimizer trains until the end."""
        if self._rule.collects:
            self.handles.append(self._pending.watch(parameter))

    def add(self, index: int, name: str, module: nn.Module) -> None:
        """Makes the next layer in order local."""
        if not self._rule.collects:
            return
        hook = UpdateHook(module, self._rule.update, Hook(self._learn, index))
        if has_plain_forward(module):
            self.handles.append(module.register_forward_hook(LayerHook(hook), with_kwargs=True))
        else:
            capture = ProductCapture(module, hook)
            self.handles += [
                module.register_forward_pre_hook(CaptureHook(capture, enters=True)),
                module.register_forward_hook(CaptureHook(capture, enters=False), always_call=True),
            ]
        self._layers[index] = _LocalLayer(name, module, hook)
        self._last = index
        self._set_due()

    def clear(self) -> None:
        """Removes all local layers."""
        self._layers.clear()

    # What the controller sets and reads

    @property
    def is_due(self) -> bool:
        """Whether the rule acts in the coming step."""
        return self.steps % self._rule.every == 0

    @property
    def acts(self) -> bool:
        """Whether the rule acts in the coming step, unless paused."""
        return self.is_due and not self._pauses

    @property
    def is_idle(self) -> bool:
        """Whether this epoch should have made updates and made none."""
        steps, due, applied = self.epoch_counts
        return steps == 0 or (due > 0 and applied == 0 and bool(self._layers))

    @property
    def skipped(self) -> int:
        """How many updates were left out because their norm was zero or not finite. Reads from the device."""
        return int(self._skipped)

    def set_step(self, step: float | Sequence[float]) -> None:
        """Sets eta with its sign, for the coming steps: one for all layers, or one for each."""
        if not isinstance(step, Sequence):
            if isinstance(self._step, Tensor):
                self._step.fill_(step)
            else:
                self._step = step
        elif isinstance(self._step, Tensor) and self._step.shape == (len(step),):
            self._step.copy_(torch.tensor(step, dtype=torch.float64))  # in place, where a recorded step looks for it
        else:
            self._step = torch.tensor(step, dtype=torch.float64)

    def make_replayable(self, device: torch.device) -> None:
        """Moves the values on which a replayed step depends to `device`."""
        if isinstance(self._step, Tensor) and self._step.dim():
            self._step = self._step.to(device)
        else:
            self._step = torch.zeros((), device=device).fill_(self._step)
        self._skipped = self._skipped.to(device)

    def resume(self, steps: int, skipped: int, epoch_counts: Sequence[int]) -> None:
        """Takes the counts of a saved state, and drops waiting updates."""
        self.steps, self.epoch_counts = steps, list(epoch_counts)
        self._skipped.fill_(skipped)
        self._pending.drop()
        self._set_due()

    def bytes_per_step(self) -> int:
        """Bytes of updates per step on average, in at least single precision."""
        sizes = (weight.numel() * max(weight.element_size(), 4) for weight in self._weights().values())
        return sum(sizes) // self._rule.every

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside it, passes make no update."""
        self._pauses += 1
        self._set_due()
        try:
            yield
        finally:
            self._pauses -= 1
            self._set_due()

    @contextmanager
    def overlapped(self, overlap: Overlap) -> Iterator[None]:
        """Inside it, products run by `overlap`, where they can."""
        self._overlap = overlap
        try:
            yield
        finally:
            self._overlap = None

    def _set_due(self) -> None:
        due = self.acts
        for _, _, hook in self._layers.values():
            hook.due = due

    # The forward pass

    def _begin_pass(self, module: nn.Module, inputs: Any) -> None:
        self._ran = None
        if not (self._model.training and torch.is_grad_enabled()):
            return
        if any(parameter.requires_grad for parameter in self._parameters):
            self._ran = set()
            self._pending.begin_pass()
        else:  # nothing learns from this pass, as in a GAN's discriminator during the generator's turn
            for _, _, hook in self._layers.values():
                hook.due = False

    def _learn(self, index: int, module: nn.Module, a: Tensor, z: Tensor) -> None:
        make, overlap = self._rule.update, self._overlap
        # Exchanges read updates during the pass; an optimizer that trains local layers changes weights before the join.
        if overlap is None or self._pending.exchange is not None or self._rule.opens:
            self._keep(index, make(module, a, z))
            return
        overlap.run(self._layers[index].name, partial(self._keep, index), make, module, a, z)
        if index == self._last:
            overlap.start()

    def _keep(self, index: int, update: Tensor) -> None:
        if self._ran is not None:
            if index in self._ran:
                raise LowcalError(runs_twice(self._layers[index].name))
            self._ran.add(index)
        self._pending.add(index, update)
        if index == self._last and self._pending.exchange is not None:
            self._pending.share(self._weights())

    def _end_pass(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._ran is None:
            self._set_due()
            return
        if self._overlap is not None:
            self._overlap.start()  # also if this pass left out the last local layer
        for index, update in self._take_compiled():
            self._keep(index, update)
        self._ran = None
        self._pending.end_pass(outputs)

    def _take_compiled(self) -> Iterator[tuple[int, Tensor]]:
        for index, (_, _, hook) in self._layers.items():
            if hook.update is not None:
                yield index, hook.update
                hook.update = None

    def _collect_compiled(self) -> None:
        """Keeps the updates of compiled passes: a model compiled as a whole does not call these hooks."""
        if self._ran is None:
            for index, update in self._take_compiled():
                self._pending.add(index, update)

    # The ranks

    def use_ranks(self, exchange: Exchange) -> None:
        """Sums updates over the ranks of `exchange` from now on."""
        self._pending.exchange = exchange

    def begin_forward(self) -> None:
        """Begins a data-parallel forward pass; DDP has written the gradients of the previous pass."""
        self._pending.settle()

    def end_forward(self) -> None:
        """Ends a data-parallel forward pass; its updates are summed even if the last local layer did not run."""
        if self._layers and self.acts and self._model.training and torch.is_grad_enabled():
            self._collect_compiled()
            self._pending.share(self._weights())

    # The step

    def count_step(self, applied: bool) -> None:
        """Counts an optimizer step, and whether it applied an update."""
        self.tick()
        self.epoch_counts[1] += self.is_due
        self.epoch_counts[2] += applied
        self.steps += 1
        self._set_due()

    def tick(self) -> None:
        """Counts an optimizer step of this epoch."""
        self.epoch_counts[0] += 1
        self.clock.tick()

    def apply(self, optimizer: Optimizer) -> bool:
        """Applies the waiting updates after a step of `optimizer`; returns whether there were any."""
        if self._overlap is not None:
            self._overlap.join()
        weights = self._weights()
        updates = self._pending.take(weights)
        if not updates:
            return False
        step = self._step
        if isinstance(step, Tensor) and step.dim():
            step = self._step = step.to(weights[next(iter(updates))].device)
            step = torch.stack([step[index] for index in updates])
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step on the device itself
        if overflow is not None:
            step = torch.where(overflow.reshape(()) > 0, 0.0, step)
        skipped = self._rule.apply([weights[index] for index in updates], list(updates.values()), step)
        self._skipped = self._skipped.to(skipped.device, non_blocking=True)
        self._skipped += skipped
        return True

    def _weights(self) -> dict[int, Tensor]:
        return {index: layer.module.weight.detach() for index, layer in self._layers.items()}  # type: ignore[operator]
