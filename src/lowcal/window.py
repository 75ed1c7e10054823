"""What the forward passes between two optimizer steps leave for the local layers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Exchange(Protocol):
    """What training on several ranks asks of them; `lowcal.parallel` has it."""

    open: bool  # whether a forward pass's updates are summed at once; False while gradients accumulate

    def start(self, updates: Mapping[int, Tensor], shapes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Starts to sum `updates` over the ranks; gives the sums, which are there after `wait`."""
        ...

    def wait(self) -> None:
        """Waits for the sums."""
        ...

    def mean(self, *values: float) -> list[float]:
        """The means of `values` over the ranks."""
        ...


class Window:
    """The local updates kept for the next optimizer step; they accumulate, and go, as gradients do.

    Gradients add up over backward passes until they are zeroed. A forward pass's updates share the fate of the
    gradients of its backward pass: if a step is skipped (mixed precision) and the gradients are zeroed, they go too,
    or else they would be applied together with those of the next step. Zeroing has many forms (`zero_grad` of
    optimizer or model, before or after the forward pass, to None or to zero), so it is read off the gradient of one
    weight that learns by SGD: after a backward pass that gradient is the same tensor, changed once in place, if and
    only if nothing was zeroed in between. A forward pass in training mode that is never back-propagated counts towards
    the next step, as it does for running statistics; evaluate in evaluation mode or without gradients.

    Attributes:
        exchange: set for data-parallel training, where updates are summed over the ranks.
    """

    def __init__(self) -> None:
        self.exchange: Exchange | None = None
        self._forward: dict[int, Tensor] = {}  # of forward passes whose backward pass is not done
        self._forward_summed = False  # whether these are sums over all ranks
        self._own: dict[int, Tensor] = {}  # of forward passes before them, this rank's alone
        self._summed: dict[int, Tensor] = {}  # the same, over all ranks
        self._awaited: Mapping[int, Tensor] | None = None  # like the updates to be summed once their fate is known
        self._weight: weakref.ref[Tensor] | None = None  # the weight whose gradient is watched
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None  # that gradient and its version

    def watch(self, modules: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Watches the gradient of the last of `modules` that has one; returns the hooks' handles."""
        window = weakref.ref(self)

        def after_backward(weight: Tensor) -> None:
            if (alive := window()) is not None:
                alive._end_backward(weight)

        for module in reversed(modules):
            weight = module.get_parameter("weight")
            if weight.requires_grad:
                self._weight = weakref.ref(weight)
                return [weight.register_post_accumulate_grad_hook(after_backward)]
        return []

    def settle(self) -> None:
        """Takes the watched gradient as it is now, after DDP has written the ranks' mean into it."""
        weight = None if self._weight is None else self._weight()
        if self._gradient is None or weight is None:
            return
        if weight.grad is None:
            self._own, self._summed, self._gradient = {}, {}, None
        else:
            self._gradient = (weakref.ref(weight.grad), weight.grad._version)

    def add(self, index: int, update: Tensor) -> None:
        """Keeps `update` for layer `index`."""
        if self._forward_summed:  # a second forward pass before the first one's backward pass
            self._close_forward()
        kept = self._forward.get(index)
        self._forward[index] = update if kept is None else kept.add_(update)

    def share(self, shapes: Mapping[int, Tensor]) -> None:
        """Starts to sum this forward pass's updates over the ranks, once; `shapes` has a tensor like each dW.

        Those of micro-batches before it are summed with it, all at once, when its backward pass tells that they count.
        """
        if self.exchange is None or self._forward_summed:
            return
        self._awaited = None
        if not self.exchange.open:  # a layer that this rank did not run counts as zero, so that all ranks keep as many
            for index, like in shapes.items():
                if index not in self._forward:
                    self._forward[index] = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        elif self._own:
            self._awaited = shapes
        else:
            self._forward = self.exchange.start(self._forward, shapes)
            self._forward_summed = True

    def take(self, shapes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Gives what is kept, by layer and over all ranks, and forgets it; `shapes` as for `share`."""
        self._close_forward()
        if self.exchange is not None:
            if self._own:
                self._sum_own(self.exchange, shapes)
            self.exchange.wait()
            self._own = self._summed
        updates = dict(sorted(self._own.items()))
        self.drop()
        return updates

    def drop(self) -> None:
        """Forgets what is kept, as when a step is broken off."""
        self._forward, self._forward_summed = {}, False
        self._own, self._summed, self._awaited, self._gradient = {}, {}, None, None

    def _close_forward(self) -> None:
        self._add_up(self._summed if self._forward_summed else self._own, self._forward)
        self._forward, self._forward_summed = {}, False

    def _sum_own(self, exchange: Exchange, shapes: Mapping[int, Tensor]) -> None:
        self._add_up(self._summed, exchange.start(self._own, shapes))
        self._own, self._awaited = {}, None

    def _add_up(self, kept: dict[int, Tensor], updates: Mapping[int, Tensor]) -> None:
        if kept and self.exchange is not None:
            self.exchange.wait()
        for index, update in updates.items():
            kept[index] = kept[index].add_(update) if index in kept else update

    def _end_backward(self, weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is None:
            return
        if self._gradient is not None:
            before, version = self._gradient
            if before() is not gradient or gradient._version != version + 1:
                self._own, self._summed = {}, {}
        self._close_forward()
        self._gradient = (weakref.ref(gradient), gradient._version)
        if self.exchange is not None and self._awaited is not None:
            self._sum_own(self.exchange, self._awaited)
