"""What the forward passes between two optimizer steps leave for the local layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Window:
    """The local updates kept for the next optimizer step; they accumulate, and go, as gradients do.

    Gradients add up over backward passes until they are zeroed. A forward pass's updates share the fate of the
    gradients of its backward pass: if a step is skipped (mixed precision) and the gradients are zeroed, they go too,
    or else they would be applied together with those of the next step. Zeroing has many forms (`zero_grad` of
    optimizer or model, before or after the forward pass, to None or to zero), so it is read off the gradient of one
    weight that learns by SGD: after a backward pass that gradient is the same tensor, changed once in place, if and
    only if nothing was zeroed in between.
    """

    def __init__(self) -> None:
        self._backward: dict[int, Tensor] = {}  # of forward passes whose backward pass is done
        self._forward: dict[int, Tensor] = {}  # of those after them
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None  # the watched gradient and its version

    def watch(self, modules: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Watches the gradient of the last of `modules` that has one; returns the hooks' handles."""
        window = weakref.ref(self)

        def after_backward(weight: Tensor) -> None:
            if (alive := window()) is not None:
                alive._end_backward(weight)

        learning = [module.weight for module in modules if module.weight.requires_grad]
        return [learning[-1].register_post_accumulate_grad_hook(after_backward)] if learning else []  # type: ignore[operator]

    def add(self, index: int, update: Tensor) -> None:
        """Keeps `update` for layer `index`."""
        kept = self._forward.get(index)
        self._forward[index] = update if kept is None else kept.add_(update)

    def take(self) -> dict[int, Tensor]:
        """Gives what is kept, by layer, and forgets it."""
        self._close_forward()
        updates, self._backward, self._gradient = self._backward, {}, None
        return dict(sorted(updates.items()))

    def _close_forward(self) -> None:
        for index, update in self._forward.items():
            kept = self._backward.get(index)
            self._backward[index] = update if kept is None else kept.add_(update)
        self._forward = {}

    def _end_backward(self, weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is None:
            return
        if self._gradient is not None:
            before, version = self._gradient
            if before() is not gradient or gradient._version != version + 1:
                self._backward = {}
        self._close_forward()
        self._gradient = (weakref.ref(gradient), gradient._version)
