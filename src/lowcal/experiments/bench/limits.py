"""The least time of a step at a boundary: its unavoidable parts, each timed by itself (docs/method.md).

The prefix and the suffix of a network are timed apart. In a residual network several tensors cross the boundary, and
which code belongs to which side depends on the boundary. So one forward pass is recorded, operation by operation, and
cut by what autograd says: an operation whose result needs a gradient belongs to the suffix, every other one to the
prefix. Replaying a part runs its operations and nothing else: no module, no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from lowcal.discovery import trace
from lowcal.experiments.bench.timing import Work
from lowcal.layers import own_parameters
from lowcal.rules import hebbian_update
from lowcal.steps.graphed import Graphs
from lowcal.steps.step import autocast


class Parts:
    """The parts of a training step at `boundary`, as works to be timed.

    Attributes:
        prefix: the prefix's forward pass without a graph.
        suffix: the full step of the suffix, on the prefix's output.
        products: the weight-gradient products of the layers before the boundary.

    Args:
        model: the network, in training mode; this object changes it.
        build_optimizer: builds the optimizer of the suffix's parameters.
        images: one mini-batch, (N, C, H, W).
        labels: its class numbers, (N,).
        graphs: records each part, for comparison with recorded steps; None: the parts run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[list[Tensor]], Optimizer],
        images: Tensor,
        labels: Tensor,
        *,
        boundary: int,
        precision: str,
        graphs: Graphs | None = None,
    ) -> None:
        self._model, self._images, self._labels = model, images, labels
        self._precision = precision
        order = trace(model, images[:1])
        own = own_parameters(order, model)
        for layer in order.layers[:boundary]:
            for parameter in own[layer]:
                parameter.requires_grad_(False)
        self._optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad])
        self._layers: list[tuple[nn.Module, Tensor, Tensor]] = []
        handles = [model.get_submodule(layer).register_forward_hook(self._keep) for layer in order.layers[:boundary]]
        with autocast(images.device, precision):
            self._program = record(model, images)
        for handle in handles:
            handle.remove()
        self._crossing = self._run_prefix()
        self._fed: list[dict[int, Tensor]] = []
        self.prefix = Work(self._run_prefix)
        self.suffix = Work(self._run_suffix, self._feed)
        self.products = Work(self._run_products)
        if graphs is not None:
            self._record(graphs)

    def _record(self, graphs: Graphs) -> None:
        def recorded(run: Callable[[], object]) -> Callable[[], None]:
            with graphs.aside():
                run()
            return graphs.record(lambda: [run()].clear())

        self.prefix = Work(recorded(self._run_prefix))
        self._feed(2)
        given = self._fed[0]  # the input of the recorded run, which is the second one

        def restore(runs: int) -> None:
            # Within a sample, a tensor that is changed in place keeps the value of the previous run.
            for slot in self._program.suffix.overwrites:
                given[slot].copy_(self._crossing[slot])

        self.suffix = Work(recorded(self._run_suffix), restore)
        self.products = Work(recorded(self._run_products))

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._layers.append((module, inputs[0].detach(), output.detach()))

    def _run_prefix(self) -> dict[int, Tensor]:
        with torch.no_grad(), autocast(self._images.device, self._precision):
            return self._program.prefix({0: self._images})

    def _feed(self, runs: int) -> None:
        fresh = self._program.suffix.overwrites
        self._fed = [
            {slot: tensor.clone() if slot in fresh else tensor for slot, tensor in self._crossing.items()}
            for _ in range(runs)
        ]

    def _run_suffix(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._images.device, self._precision):
            (logits,) = self._program.suffix(self._fed.pop()).values()
            loss = F.cross_entropy(logits, self._labels)
        loss.backward()
        self._optimizer.step()

    def _run_products(self) -> None:
        for module, inputs, outputs in self._layers:
            hebbian_update(module, inputs, outputs)


@dataclass(frozen=True)
class _Slot:
    """Stands in recorded arguments for the tensor that an earlier operation made."""

    index: int


@dataclass(frozen=True)
class _Operation:
    function: Callable[..., Any]
    args: Any
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]  # the slot of each leaf of the result; None: no tensor
    in_suffix: bool

    def inputs(self) -> Iterable[int]:
        return (leaf.index for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, _Slot))


class Part:
    """Operations that run one after another; a tensor is dropped as soon as no later operation needs it.

    Args:
        operations: in the order in which they run.
        results: the slots whose tensors are wanted in the end.

    Attributes:
        needs: the slots whose tensors must be given.
        overwrites: those of them that an operation changes in place, so that each run needs new ones.
    """

    def __init__(self, operations: Sequence[_Operation], results: Sequence[int]) -> None:
        self.results = tuple(results)
        made: set[int] = set()
        needs: set[int] = set()
        for operation in operations:
            needs |= set(operation.inputs()) - made
            made |= {slot for slot in operation.outputs if slot is not None}
        self.needs = needs | (set(results) - made)
        self.overwrites = needs & made
        kept = set(results)
        steps: list[tuple[_Operation, tuple[int, ...]]] = []
        for operation in reversed(operations):
            touched = {*operation.inputs(), *(slot for slot in operation.outputs if slot is not None)}
            steps.append((operation, tuple(touched - kept)))
            kept |= touched
        self._steps = steps[::-1]

    def __call__(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Runs the operations on `tensors`, by slot; returns those of the results."""
        held = dict(tensors)
        for operation, done in self._steps:
            output = operation.function(*_fill(operation.args, held), **_fill(dict(operation.kwargs), held))
            leaves = (output,) if isinstance(output, Tensor) else tree_leaves(output)
            held.update((slot, leaf) for slot, leaf in zip(operation.outputs, leaves, strict=True) if slot is not None)
            del output, leaves
            for slot in done:
                held.pop(slot, None)
        return {slot: held[slot] for slot in self.results}


@dataclass(frozen=True)
class Program:
    """A recorded forward pass in two parts.

    Attributes:
        prefix: takes the images, in slot 0; gives the tensors that cross the boundary.
        suffix: takes those; gives the network's output alone.
    """

    prefix: Part
    suffix: Part


class _Recorder(TorchFunctionMode):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._slots = {id(images): 0}
        self._alive: list[Any] = [images]  # so that no two tensors have the same id

    def slot(self, tensor: Tensor) -> int:
        return self._slots[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Filled in before the call: an operation in place gives the tensor that it was given.
        recorded_args, recorded_kwargs = tree_map_only(Tensor, self._placeholder, (args, kwargs))
        output = func(*args, **kwargs)
        leaves = tree_flatten(output)[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors and getattr(func, "__name__", "") != "__setitem__":
            return output  # a shape or the like, which stays what it is
        self._alive.append(leaves)
        outputs = tuple(
            self._slots.setdefault(id(leaf), len(self._slots)) if isinstance(leaf, Tensor) else None for leaf in leaves
        )
        in_suffix = any(tensor.requires_grad for tensor in tensors)
        self.operations.append(_Operation(func, recorded_args, recorded_kwargs, outputs, in_suffix))
        return output

    def _placeholder(self, tensor: Tensor) -> Any:
        slot = self._slots.get(id(tensor))
        return tensor if slot is None else _Slot(slot)


def record(model: nn.Module, images: Tensor) -> Program:
    """The forward pass of `model` on `images`, cut where its first parameter with ``requires_grad`` comes in.

    The network must return one tensor. A replay works on the network's own parameters and buffers, with the control
    flow that `images` took.
    """
    with _Recorder(images) as recorder:
        output = model(images)
    prefix = [operation for operation in recorder.operations if not operation.in_suffix]
    suffix = Part([operation for operation in recorder.operations if operation.in_suffix], [recorder.slot(output)])
    return Program(Part(prefix, sorted(suffix.needs)), suffix)


def _fill(arguments: Any, tensors: Mapping[int, Tensor]) -> Any:
    """`arguments` with tensors in place of their slots."""
    if type(arguments) is _Slot:
        return tensors[arguments.index]
    if type(arguments) in (tuple, list):
        return type(arguments)([_fill(argument, tensors) for argument in arguments])
    if type(arguments) is dict:
        return {name: _fill(argument, tensors) for name, argument in arguments.items()}
    return arguments
