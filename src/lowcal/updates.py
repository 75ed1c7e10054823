"""What local layers do in a step: updates made in the forward pass, applied after the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.discovery import runs_twice
from lowcal.errors import LowcalError
from lowcal.hooks import CaptureHook, Hook, LayerHook, Tap
from lowcal.products import ProductCapture, has_plain_forward
from lowcal.rules import Rule
from lowcal.window import Window

if TYPE_CHECKING:
    from lowcal.parallel import Exchange


class _Learner(NamedTuple):
    """A layer that learns locally, and what makes its updates."""

    name: str
    module: nn.Module
    tap: Tap


class LocalUpdates:
    """The updates of a network's local layers, from the forward pass that makes them to the step that applies them.

    A hook on each of these layers makes its dW (`Rule.update`) as the forward pass runs it, and keeps it. `apply`,
    called right after ``optimizer.step()``, moves all of their weights by what is kept (`Rule.apply`). Nothing that
    happens in a step reads from the device.

    Layers go by their index in the order of execution.

    Args:
        model: the network.
        rule: what makes updates and applies them.

    Attributes:
        steps: optimizer steps since the first layer became local.
        epoch_counts: of this epoch: steps, those of them in which the rule acts, those of them that applied an update.
        handles: of the hooks.
    """

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        self.steps = 0
        self.epoch_counts = [0, 0, 0]
        self.handles: list[RemovableHandle] = []
        self._model, self._rule = model, rule
        self._window = Window(self._collect_compiled)
        self._learners: dict[int, _Learner] = {}
        self._last: int | None = None  # of the learners: when it has run, the pass has made all of its updates
        self._ran: set[int] | None = None  # learners that this forward pass has run; None outside of counted passes
        self._parameters: Sequence[nn.Parameter] = ()  # of the layers, the last layer's first
        self._pauses = 0
        self._step: float | Tensor = 0.0  # eta with its sign, or a layer's each; on the device where it replays steps
        self._skipped: Tensor = torch.zeros((), dtype=torch.int64)

    # Which layers learn

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watches the network's passes before its first layer becomes local.

        Args:
            parameters: those of all layers and what follows them, first to last.
        """
        if self._rule.collects:
            self._parameters = parameters[::-1]
            self.handles += [
                self._model.register_forward_pre_hook(Hook(self._begin_pass)),
                self._model.register_forward_hook(Hook(self._end_pass), always_call=True),
            ]

    def watch_backward(self, parameter: nn.Parameter) -> None:
        """Watches the gradient of `parameter`, which learns by the optimizer to the end."""
        if self._rule.collects:
            self.handles.append(self._window.watch(parameter))

    def add(self, index: int, name: str, module: nn.Module) -> None:
        """Lets a layer learn locally, the one after those so far."""
        if not self._rule.collects:
            return
        tap = Tap(module, self._rule.update, Hook(self._keep, index))
        if has_plain_forward(module):
            self.handles.append(module.register_forward_hook(LayerHook(tap), with_kwargs=True))
        else:
            capture = ProductCapture(module, tap)
            self.handles += [
                module.register_forward_pre_hook(CaptureHook(capture, enters=True)),
                module.register_forward_hook(CaptureHook(capture, enters=False), always_call=True),
            ]
        self._learners[index] = _Learner(name, module, tap)
        self._last = index
        self._set_due()

    def clear(self) -> None:
        """Lets no layer learn any more."""
        self._learners.clear()

    # What the controller sets and reads

    @property
    def is_due(self) -> bool:
        """Whether the rule acts in the coming step."""
        return self.steps % self._rule.every == 0

    @property
    def is_idle(self) -> bool:
        """Whether this epoch made none of the updates that it should have made."""
        steps, due, applied = self.epoch_counts
        return steps == 0 or (due > 0 and applied == 0 and bool(self._learners))

    @property
    def skipped(self) -> int:
        """Layers' updates left out so far because their norm was zero or not finite. Reads from the device."""
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
        """Puts on `device` what a step that it replays depends on."""
        if isinstance(self._step, Tensor) and self._step.dim():
            self._step = self._step.to(device)
        else:
            self._step = torch.zeros((), device=device).fill_(self._step)
        self._skipped = self._skipped.to(device)

    def resume(self, steps: int, skipped: int, epoch_counts: Sequence[int]) -> None:
        """Takes the counts of a saved state, and forgets the updates kept."""
        self.steps, self.epoch_counts = steps, list(epoch_counts)
        self._skipped.fill_(skipped)
        self._window.drop()
        self._set_due()

    def bytes_per_step(self) -> int:
        """Bytes of updates that a step makes, on average over the steps, in single precision at least."""
        sizes = (weight.numel() * max(weight.element_size(), 4) for weight in self._weights().values())
        return sum(sizes) // self._rule.every

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, passes make no update."""
        self._pauses += 1
        self._set_due()
        try:
            yield
        finally:
            self._pauses -= 1
            self._set_due()

    def _set_due(self) -> None:
        due = self.is_due and not self._pauses
        for _, _, tap in self._learners.values():
            tap.due = due

    # The forward pass

    def _begin_pass(self, module: nn.Module, inputs: Any) -> None:
        self._ran = None
        if not (self._model.training and torch.is_grad_enabled()):
            return
        if any(parameter.requires_grad for parameter in self._parameters):
            self._ran = set()
            self._window.begin_pass()
        else:  # as a GAN's discriminator in the generator's turn: nothing in it learns from this pass
            for _, _, tap in self._learners.values():
                tap.due = False

    def _keep(self, index: int, update: Tensor) -> None:
        if self._ran is not None:
            if index in self._ran:
                raise LowcalError(runs_twice(self._learners[index].name))
            self._ran.add(index)
        self._window.add(index, update)
        if index == self._last and self._window.exchange is not None:
            self._window.share(self._weights())

    def _end_pass(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._ran is None:
            self._set_due()
            return
        for index, update in self._take_compiled():
            self._keep(index, update)
        self._ran = None
        self._window.end_pass(outputs)

    def _take_compiled(self) -> Iterator[tuple[int, Tensor]]:
        for index, (_, _, tap) in self._learners.items():
            if tap.update is not None:
                yield index, tap.update
                tap.update = None

    def _collect_compiled(self) -> None:
        """Keeps what passes of a model that is compiled as a whole have made: they call none of these hooks."""
        if self._ran is None:
            for index, update in self._take_compiled():
                self._window.add(index, update)

    # The ranks

    def use_ranks(self, exchange: Exchange) -> None:
        """Sums updates over the ranks of `exchange` from now on."""
        self._window.exchange = exchange

    def begin_forward(self) -> None:
        """Begins a data-parallel forward pass: DDP has written the gradients of the pass before."""
        self._window.settle()

    def end_forward(self) -> None:
        """Ends a data-parallel forward pass: its updates are summed even if the last of the layers did not run."""
        due = self._learners and self.is_due and not self._pauses
        if due and self._model.training and torch.is_grad_enabled():
            self._collect_compiled()
            self._window.share(self._weights())

    # The step

    def count_step(self, applied: bool) -> None:
        """Counts an optimizer step, and whether it applied an update."""
        counts = self.epoch_counts
        self.epoch_counts = [counts[0] + 1, counts[1] + self.is_due, counts[2] + applied]
        self.steps += 1
        self._set_due()

    def apply(self, optimizer: Optimizer) -> bool:
        """Moves the weights by the updates kept, after a step of `optimizer`; tells whether there were any."""
        weights = self._weights()
        updates = self._window.take(weights)
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
        return {index: learner.module.weight.detach() for index, learner in self._learners.items()}  # type: ignore[operator]
