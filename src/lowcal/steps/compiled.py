"""The step with compiled blocks. Each block is compiled separately, so a move compiles only the blocks it changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.drop_path import check_computes_all
from lowcal.errors import LowcalError
from lowcal.layers import weight_layers
from lowcal.steps.step import EagerStep, Learning, StepOptions

BACKEND: str | Callable[..., Any] = "inductor"

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class CompiledStep:
    """The eager step on a network whose blocks are compiled (`find_blocks`); build another one after each move.

    Equal blocks share compiled code, in all networks of the process. A block is compiled again when what learns in it
    has changed, and once each for an input with and without a gradient: a bounded number of times in a run. Dropped
    blocks and evaluation are not compiled. Neither are mini-batches of another size than the full one, such as the last
    of an epoch.

    Raises:
        LowcalError: the network has no block.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions
    ) -> None:
        self._step = EagerStep(model, optimizers, learning, options)
        self._batch = options.batch
        self._switch = _Switch()
        self.check(model, optimizers, learning, options)
        self._blocks = find_blocks(model)
        for block in self._blocks.values():
            key = (_signature(block), options.batch, options.precision, options.device, BACKEND)
            block._compiled_call_impl = _Call(block, _compiled(key), self._switch)
        self._hooks = self._present_hooks()
        self._last_hook = RemovableHandle.next_id

    @staticmethod
    def check(model: nn.Module, optimizers: Sequence[Optimizer], learning: Learning, options: StepOptions) -> None:
        """Refuses a network without blocks, and one whose shapes differ from step to step."""
        check_computes_all(model, "compiled")
        if not find_blocks(model):
            raise LowcalError(f"{type(model).__name__} has no block of layers to compile; use the step 'eager'")

    @property
    def skipped(self) -> Tensor | None:
        """See `Step`."""
        return self._step.skipped

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch; see `Step`.

        Raises:
            LowcalError: a block cannot be compiled, or a hook was registered on it after the step was built.
        """
        if RemovableHandle.next_id != self._last_hook:  # somewhere in the process a hook was registered
            self._check_hooks()
        self._switch.on = self._batch in (None, len(batch[0]))
        try:
            return self._step(*batch)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
            raise LowcalError(f"a block cannot be compiled ({lines[0]}); use the step 'eager'") from error
        finally:
            self._switch.on = False

    def _check_hooks(self) -> None:
        hooks = self._present_hooks()
        for name, found in hooks.items():
            if found != self._hooks[name]:
                raise LowcalError(
                    f"hooks on '{name}' have changed since it was compiled, and compiled code does not run them; "
                    "register hooks before the step is built, or use the step 'eager'"
                )
        self._last_hook = RemovableHandle.next_id

    def _present_hooks(self) -> dict[str, list[int]]:
        return {
            f"{name}.{inner}".rstrip("."): [key for kind in _HOOKS for key in getattr(module, kind)]
            for name, block in self._blocks.items()
            for inner, module in block.named_modules()
        }


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that are compiled separately, by name.

    They are the outermost modules that hold weight layers and whose class occurs several times in the network, and
    the outermost other modules that hold weight layers but none of these, such as a stem.
    """
    layers = set(weight_layers(model).values())

    def holds_layer(module: nn.Module) -> bool:
        return any(inner in layers for inner in module.modules() if inner is not module)

    classes = [
        type(module)
        for module in model.modules()
        if module is not model and not isinstance(module, _CONTAINERS) and holds_layer(module)
    ]
    recurring = tuple({kind for kind in classes if classes.count(kind) > 1})
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if not holds_layer(child):
                continue
            is_whole = isinstance(child, recurring) or not any(isinstance(m, recurring) for m in child.modules())
            if is_whole and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                found[prefix + name] = child
            else:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


class _Switch:
    on = False


class _Call:
    """What calling a block does: the compiled code in training steps, else the usual call."""

    def __init__(self, block: nn.Module, compiled: Callable[..., Any], switch: _Switch) -> None:
        self._block, self._compiled, self._switch = block, compiled, switch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self._block
        if self._switch.on and block.training and torch.is_grad_enabled() and "forward" not in block.__dict__:
            return self._compiled(block, *args, **kwargs)
        return block._call_impl(*args, **kwargs)


def _signature(block: nn.Module) -> Hashable:
    """Equal for two blocks only if they can share compiled code; covers what guards do not check."""
    parameters = tuple((p.shape, p.stride(), p.dtype, p.requires_grad) for p in block.parameters())
    hooks = tuple(len(getattr(module, kind)) for module in block.modules() for kind in _HOOKS)
    return type(block), repr(block), parameters, hooks


_compiled_code: dict[Hashable, Callable[..., Any]] = {}


def _compiled(key: Hashable) -> Callable[..., Any]:
    """The compiled function that calls a block with this key.

    It has its own code object, because torch stores, finds and counts compiled code (``recompile_limit``) by code
    object; `nn.Module.compile` has a single one for all modules.
    """
    if key not in _compiled_code:
        code = _call_block.__code__.replace(co_name=f"block_{len(_compiled_code)}")
        function = FunctionType(code, globals())
        # The same dropout as in the eager step.
        options: dict[str, Any] = {"fallback_random": True} if BACKEND == "inductor" else {}
        options["guard_filter_fn"] = _without_hook_numbers
        _compiled_code[key] = torch.compile(
            function,
            fullgraph=True,  # at the limit, or at a graph break, an error instead of a slow step
            dynamic=False,
            backend=BACKEND,
            options=options,
        )
    return _compiled_code[key]


def _without_hook_numbers(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: torch 2.10 guards the numbers of hooks, which differ from block to block."""
    return ["_hooks_with_kwargs" not in guard.name for guard in guards]


def _call_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)
