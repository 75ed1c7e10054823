"""A forward pass recorded operation by operation, and cut in two where the first parameter that learns comes in.

In a residual network several tensors cross this boundary, and which code belongs to which side depends on the boundary.
So the operations of one pass are recorded, and autograd says where each belongs. Replaying a part runs its operations
and nothing else: no module, no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

_READS = frozenset({"__bool__", "__int__", "__float__", "__index__", "item", "tolist"})


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
    needs_gradient: bool  # the result
    has_effect: bool  # it changes a tensor of the network, as a counter of batches

    def inputs(self) -> Iterable[int]:
        return (leaf.index for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, _Slot))


class Part:
    """Operations that run one after another; a tensor is dropped as soon as no later operation needs it.

    Args:
        operations: in the order in which they run.
        results: the slots whose tensors are wanted in the end.

    Attributes:
        results: as given.
        needs: the slots whose tensors must be given.
        overwrites: those of them that an operation changes in place, so that each run needs new ones.
        tensors: the network's parameters and buffers, and other tensors from outside, that the operations read.
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
        leaves = tree_leaves([(operation.args, dict(operation.kwargs)) for operation in operations])
        self.tensors = tuple({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
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
        reads: whether the pass read the values of tensors, on which its control flow may depend.
    """

    prefix: Part
    suffix: Part
    reads: bool


class _Recorder(TorchFunctionMode):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.reads = False
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
        name = getattr(func, "__name__", "")
        if not tensors and name != "__setitem__":
            self.reads |= name in _READS
            return output  # a shape or the like, which stays what it is
        self._alive.append(leaves)
        given = {id(leaf) for leaf in tree_leaves((recorded_args, recorded_kwargs)) if isinstance(leaf, Tensor)}
        has_effect = any(id(tensor) in given for tensor in tensors)
        outputs = tuple(
            self._slots.setdefault(id(leaf), len(self._slots)) if isinstance(leaf, Tensor) else None for leaf in leaves
        )
        needs_gradient = any(tensor.requires_grad for tensor in tensors)
        operation = _Operation(func, recorded_args, recorded_kwargs, outputs, needs_gradient, has_effect)
        self.operations.append(operation)
        return output

    def _placeholder(self, tensor: Tensor) -> Any:
        slot = self._slots.get(id(tensor))
        return tensor if slot is None else _Slot(slot)


def record(model: nn.Module, images: Tensor) -> Program:
    """The forward pass of `model` on `images`, cut where its first parameter with ``requires_grad`` comes in.

    The network must return one tensor. A replay works on the network's own parameters and buffers, with the control
    flow that `images` took, and on mini-batches of their size only.
    """
    with _Recorder(images) as recorder:
        output = model(images)
    prefix, suffix = _cut(recorder.operations, recorder.slot(output))
    later = Part(suffix, [recorder.slot(output)])
    return Program(Part(prefix, sorted(later.needs)), later, recorder.reads)


class Suffix(nn.Module):
    """The layers behind the boundary, as a module: from what `Cached.gather` returns to the network's output.

    Its parameters and buffers are those of the network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.programs: dict[int, Program] = {}  # for each size of mini-batch

    def forward(self, *crossing: Tensor) -> Tensor:
        """The network's output."""
        program = self.programs[len(crossing[0])]
        (output,) = program.suffix(dict(zip(program.prefix.results, crossing, strict=True))).values()
        return output


def _cut(operations: Sequence[_Operation], output: int) -> tuple[list[_Operation], list[_Operation]]:
    """The operations of the prefix and of the suffix.

    What depends on a parameter that learns belongs to the suffix, other work on the images to the prefix. The rest
    (constants, random masks, counters) belongs where it is needed; a counter, where it is met.
    """
    of_images, of_suffix = {0}, set[int]()
    sides: list[str] = []
    for operation in operations:
        inputs, outputs = set(operation.inputs()), {slot for slot in operation.outputs if slot is not None}
        if operation.needs_gradient or inputs & of_suffix:
            of_suffix |= outputs
            sides.append("suffix")
        elif inputs & of_images:
            of_images |= outputs
            sides.append("prefix")
        else:
            sides.append(("suffix" if of_suffix else "prefix") if operation.has_effect else "")
    parts: dict[str, list[_Operation]] = {"prefix": [], "suffix": []}
    needed: dict[str, set[int]] = {"prefix": set(), "suffix": {output}}
    for operation, side in zip(reversed(operations), reversed(sides), strict=True):
        for name, part in parts.items():
            if side == name or (not side and needed[name].intersection(operation.outputs)):
                part.append(operation)
                needed[name].update(operation.inputs())
    return parts["prefix"][::-1], parts["suffix"][::-1]


def _fill(arguments: Any, tensors: Mapping[int, Tensor]) -> Any:
    """`arguments` with tensors in place of their slots."""
    if type(arguments) is _Slot:
        return tensors[arguments.index]
    if type(arguments) in (tuple, list):
        return type(arguments)([_fill(argument, tensors) for argument in arguments])
    if type(arguments) is dict:
        return {name: _fill(argument, tensors) for name, argument in arguments.items()}
    return arguments
