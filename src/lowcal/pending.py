"""The local updates that wait for the next optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lowcal.products import at_least_single

if TYPE_CHECKING:
    from lowcal.parallel import Exchange


class _Pass:
    """The updates of one forward pass. The autograd graph keeps it alive, so an unused graph deletes it."""

    def __init__(self) -> None:
        self.updates: dict[int, Tensor] = {}
        self.is_summed = False  # whether these are sums over all ranks
        self.is_ended = False
        self.is_closed = False  # whether they have been counted


class PendingUpdates:
    """The local updates that wait for the next optimizer step; they add up, and are dropped, as gradients are.

    The updates of a forward pass count once its outputs are back-propagated. A pass for logging, or one whose loss was
    discarded, does not count. Gradients add up over backward passes until they are zeroed, and so do updates. If a step
    is skipped (mixed precision) and the gradients are zeroed, the updates are dropped too. Otherwise they would be
    applied together with those of the next step. There are many ways to zero gradients (`zero_grad` of optimizer or
    model, before or after the forward pass, to None or to zero). So this class observes the gradient of one weight that
    learns by SGD: after a backward pass it is the same tensor, changed once in place, exactly if nothing was zeroed.

    An update may be in half precision; sums are in at least single precision.

    Updates of compiled passes are collected after a backward pass and before a step, for all passes together.

    Args:
        collect: called before updates are read, to add those of compiled passes. Held weakly.

    Attributes:
        exchange: set for data-parallel training, where updates are summed over the ranks.
    """

    def __init__(self, collect: Callable[[], None]) -> None:
        self.exchange: Exchange | None = None
        self._collect = weakref.WeakMethod(collect)
        self._pass: _Pass | None = None  # the current forward pass, or the last one
        self._reached: list[_Pass] = []  # passes that a backward pass has reached
        self._own: dict[int, Tensor] = {}  # of passes whose backward pass is done, on this rank only
        self._summed: dict[int, Tensor] = {}  # the same, over all ranks
        self._awaited: Mapping[int, Tensor] | None = None  # like the updates to sum after the backward pass
        self._weight: weakref.ref[Tensor] | None = None  # the weight whose gradient is observed
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None  # that gradient and its version

    def watch(self, weight: nn.Parameter) -> RemovableHandle:
        """Observes the gradient of `weight`; returns the hook's handle."""
        pending = weakref.ref(self)

        def after_backward(weight: Tensor) -> None:
            if (alive := pending()) is not None:
                alive._end_backward(weight)

        self._weight = weakref.ref(weight)
        required = weight.requires_grad
        handle = weight.requires_grad_().register_post_accumulate_grad_hook(after_backward)
        weight.requires_grad_(required)
        return handle

    def settle(self) -> None:
        """Reads the observed gradient again, after DDP has written the ranks' mean into it."""
        weight = None if self._weight is None else self._weight()
        if self._gradient is None or weight is None:
            return
        if weight.grad is None:
            self._own, self._summed, self._gradient = {}, {}, None
        else:
            self._gradient = (weakref.ref(weight.grad), weight.grad._version)

    def begin_pass(self) -> None:
        """Begins a forward pass of the model."""
        self._pass = _Pass()

    def end_pass(self, outputs: Any) -> None:
        """Ends it; it counts once the gradient of one of its `outputs` is computed."""
        ended = self._pass
        if ended is None:
            return
        ended.is_ended = True
        if not ended.updates:
            return
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._reach(ended))
        if not tensors and outputs is not None:  # outputs of an unknown kind: count the pass now
            self._reach(ended)

    def add(self, index: int, update: Tensor) -> None:
        """Keeps `update` for layer `index`, of the current pass or of a part of the model that was called directly."""
        if self._pass is None or self._pass.is_ended:
            self._pass = _Pass()
            self._reach(self._pass)
        kept = self._pass.updates.get(index)
        self._pass.updates[index] = update if kept is None else at_least_single(kept).add_(update)

    def share(self, shapes: Mapping[int, Tensor]) -> None:
        """Starts to sum this forward pass's updates over the ranks, once; `shapes` has a tensor like each dW.

        Updates of earlier micro-batches are summed together with them, after the backward pass.
        """
        if self._pass is None:
            self._pass = _Pass()
        current = self._pass
        if self.exchange is None or current.is_summed:
            return
        self._awaited = None
        if not self.exchange.open:  # a layer that this rank did not run counts as zero, so that all ranks keep as many
            for index, like in shapes.items():
                if index not in current.updates:
                    current.updates[index] = torch.zeros_like(
                        like, dtype=torch.promote_types(like.dtype, torch.float32)
                    )
        elif self._own:
            self._awaited = shapes
        else:
            current.updates = self.exchange.start(current.updates, shapes)
            current.is_summed = True

    def take(self, shapes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Returns the updates by layer, summed over all ranks, and drops them here; `shapes` as for `share`."""
        self._close_passes()
        if self.exchange is not None:
            if self._own:
                self._sum_own(self.exchange, shapes)
            self.exchange.wait()
            self._own = self._summed
        updates = dict(sorted(self._own.items()))
        self.drop()
        return updates

    def drop(self) -> None:
        """Drops all updates, for example when a step is abandoned."""
        self._pass, self._reached = None, []
        self._own, self._summed, self._awaited, self._gradient = {}, {}, None, None

    def _reach(self, reached: _Pass) -> None:
        if not reached.is_closed and reached not in self._reached:
            self._reached.append(reached)

    def _close_passes(self) -> None:
        if (collect := self._collect()) is not None:
            collect()
        for ended in self._reached:
            self._add_up(self._summed if ended.is_summed else self._own, ended.updates)
            ended.is_closed, ended.updates = True, {}
        self._pass, self._reached = None, []

    def _sum_own(self, exchange: Exchange, shapes: Mapping[int, Tensor]) -> None:
        self._add_up(self._summed, exchange.start(self._own, shapes))
        self._own, self._awaited = {}, None

    def _add_up(self, kept: dict[int, Tensor], updates: Mapping[int, Tensor]) -> None:
        if kept and self.exchange is not None:
            self.exchange.wait()
        for index, update in updates.items():
            kept[index] = at_least_single(kept[index]).add_(update) if index in kept else update

    def _end_backward(self, weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is None:
            return
        if self._gradient is not None:
            before, version = self._gradient
            if before() is not gradient or gradient._version != version + 1:
                self._own, self._summed = {}, {}
        self._close_passes()
        self._gradient = (weakref.ref(gradient), gradient._version)
        if self.exchange is not None and self._awaited is not None:
            self._sum_own(self.exchange, self._awaited)
