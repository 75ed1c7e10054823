"""Finds the order in which a network's layers run, from its own forward passes or from an example input."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError
from lowcal.hooks import Hook
from lowcal.layers import Order, is_adapted, parameters_of, unchanged, weight_layers, weight_of, weights_of
from lowcal.products import has_plain_forward, product_of

Wants = Callable[[nn.Parameter], bool]


class Discovery:
    """Observes forward passes of a network until the place of every layer is known.

    Args:
        model: the network.
        found: called with the order each time that more layers are known; held weakly.
        wants: whether the user wants a parameter to learn.

    Attributes:
        order: the order known so far.
        settled: the number of leading layers whose places cannot change any more, set by `LocalLayers`.
        handles: the hooks' handles.
    """

    def __init__(self, model: nn.Module, found: Callable[[Order], None], wants: Wants) -> None:
        self.order = Order()
        self.settled = 0
        self.handles: list[RemovableHandle] = []
        self._model, self._wants = model, wants
        self._found = Hook(found)
        self._tracer: Tracer | None = None
        self._compiled_inputs: tuple[Any, Any] | None = None  # of a compiled pass, which cannot be observed

    def watch_next_forward(self) -> None:
        """Takes the order from the network's next forward pass."""
        self._stop()
        self.handles += [
            self._model.register_forward_pre_hook(_PassBegin(self), with_kwargs=True),
            self._model.register_forward_hook(Hook(self._end), with_kwargs=True, always_call=True),
        ]

    def take(self, order: Order) -> None:
        """Takes `order`, and observes later passes if it lacks a layer.

        Raises:
            LowcalError: it has a new layer among the settled ones. Nothing changes then.
        """
        late = set(order.layers[: self.settled]) - set(self.order.layers)
        if late:
            raise LowcalError(_comes_late(late.pop()))
        self._found(order)
        self._stop()
        self.order = order
        for name, module in weight_layers(self._model).items():
            if name not in order.layers:
                self.handles.append(module.register_forward_pre_hook(Hook(self._meet, name)))

    def finish(self) -> None:
        """Takes the order from the inputs of a compiled pass, if there was one."""
        if self._compiled_inputs is not None:
            inputs, keywords = self._compiled_inputs
            self._take_from(lambda: _trace(self._model, inputs, keywords, self._wants))

    def _begin(self, inputs: tuple[Any, ...]) -> None:
        self._tracer = Tracer(self._model, self._wants)
        self._tracer.__enter__()

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], outputs: Any) -> None:
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        tracer.__exit__(None, None, None)
        # A pass that failed calls this too, with no output: the next one shows the order.
        if outputs is not None:
            self._take_from(lambda: _completed(self._model, tracer.order(), inputs, keywords, self._wants))

    def _take_from(self, find: Callable[[], Order]) -> None:
        """Takes the order that `find` returns; `find` may run the network. If it fails, the next pass is observed."""
        self._stop()
        try:
            self.take(self.order.merged(find()))
        except Exception:
            self.watch_next_forward()
            raise

    def _meet(self, name: str, module: nn.Module, inputs: Any) -> None:
        """Called when a layer runs that the order lacks."""
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.settled:
            raise LowcalError(_comes_late(name))
        self.watch_next_forward()

    def _stop(self) -> None:
        self._compiled_inputs = None
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class _PassBegin(Hook):
    """Begins to observe a pass. A compiled pass runs no Python code, so its inputs are kept instead."""

    def __init__(self, discovery: Discovery) -> None:
        super().__init__(discovery._begin)
        self._discovery = discovery

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._discovery._compiled_inputs = inputs, keywords
        else:
            super().__call__(inputs)


def _comes_late(name: str) -> str:
    return (
        f"layer '{name}' runs for the first time after the boundary has moved, so its place is not known; "
        "give LoCal example_inputs with which every layer runs"
    )


class Tracer(TorchFunctionMode):
    """Observes one forward pass of `model` inside a ``with`` block; `order()` then returns what ran."""

    def __init__(self, model: nn.Module, wants: Wants) -> None:
        super().__init__()
        self._wants = wants
        self._layers = {module: name for name, module in weight_layers(model).items()}
        self._modules = {module: name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._weights = {id(weight): name for module, name in self._layers.items() for weight in weights_of(module)}
        self._ran: list[str] = []
        self._running: list[nn.Module] = []  # layers whose forward has begun and not ended
        self._products: Counter[str] = Counter()  # products of a layer's input with its weight, in its forward
        self._twice: set[str] = set()
        self._elsewhere: dict[str, int] = {}  # layer -> layers that had run when its weight was used outside of it
        self._used: dict[str, int] = {}  # parameter -> layers that had run when it was first used
        self._started: dict[str, int] = {}  # module -> layers that had run when its forward began
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Tracer:
        for module in self._modules:
            if module in self._layers or module._parameters or isinstance(module, _NormBase):
                self._handles.append(module.register_forward_pre_hook(self._enter_module))
            if module in self._layers:
                self._handles.append(module.register_forward_hook(self._leave_layer, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._started.setdefault(self._modules[module], len(self._ran))
        name = self._layers.get(module)
        if name is None:
            return
        self._running.append(module)
        if name in self._ran:
            self._twice.add(name)
        else:
            self._ran.append(name)

    def _leave_layer(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        is_view = isinstance(outputs, Tensor) and outputs._is_view()
        if getattr(func, "__name__", "") != "__get__" or is_view:  # reading .T is use; reading .shape or .grad is not
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self._parameters:
                    self._note_use(leaf)
        if self._running and (product := product_of(func, args, kwargs)) is not None:
            layer = self._running[-1]
            self._products[self._layers[layer]] += product.weight is weight_of(layer)
        return outputs

    def _note_use(self, parameter: nn.Parameter) -> None:
        self._used.setdefault(self._parameters[id(parameter)], len(self._ran))
        layer = self._weights.get(id(parameter))
        if layer is None or not self._wants(parameter):
            return
        if not (self._running and any(parameter is weight for weight in weights_of(self._running[-1]))):
            self._elsewhere.setdefault(layer, len(self._ran))

    def order(self) -> Order:
        """The order of the layers that the pass ran.

        Raises:
            LowcalError: it ran no layer.
        """
        if not self._ran:
            raise LowcalError(
                "the forward pass ran no linear or convolution layer as a module, so nothing can learn locally; "
                "call the layers, not their weights"
            )
        modules = {name: module for module, name in self._layers.items()}
        own = {id(parameter) for name in self._ran for parameter in parameters_of(modules[name])}
        followers: dict[str, str] = {}
        for key, name in self._parameters.items():
            seen = self._used.get(name, self._started.get(name.rpartition(".")[0]))
            if key not in own and seen is not None:
                followers[name] = self._ran[max(seen - 1, 0)]
        norms = {
            name: self._ran[max(self._started[name] - 1, 0)]
            for module, name in self._modules.items()
            if isinstance(module, _NormBase) and name in self._started
        }
        return Order(tuple(self._ran), followers, norms, self._limits(modules))

    def _limits(self, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        """The reason for each layer that cannot become local; a layer whose weight the user froze always can."""
        limits: dict[str, str] = {}
        first_with: dict[int, str] = {}
        for name in self._ran:
            module, kind = modules[name], type(modules[name]).__name__
            weights = weights_of(module)
            if not weights:
                limits[name] = (
                    f"layer '{name}' computes its weight from other parameters, which a local update cannot set; "
                    "undo that before LoCal is built (remove_parametrizations, remove_spectral_norm, "
                    f"remove_weight_norm or prune.remove of torch.nn.utils), {_OR_STAY}"
                )
                continue
            learning = [weight for weight in weights if self._wants(weight)]
            if not learning:
                continue
            if name in self._twice:
                limits[name] = runs_twice(name)
            elif not (is_adapted(module) or has_plain_forward(module)) and self._products[name] != 1:
                limits[name] = (
                    f"layer '{name}' cannot learn locally: {kind} has a forward of its own, in which the weight is "
                    f"a factor of {self._products[name]} products of a linear layer or convolution instead of one; "
                    f"use a layer of torch.nn, {_OR_STAY}"
                )
            for weight in learning:
                first = first_with.setdefault(id(weight), name)
                if first != name:
                    limits[first] = (
                        f"layers '{first}' and '{name}' share one weight, which cannot learn both locally and by SGD; "
                        f"give each layer a weight of its own, {_OR_STAY}"
                    )
        for name, position in self._elsewhere.items():
            if name in self._ran:
                first = self._ran[min(position, self._ran.index(name), len(self._ran) - 1)]
                limits[first] = (
                    f"layer '{first}' cannot become local: the weight of layer '{name}' is also used outside of that "
                    f"layer, so back-propagation would go on (as for an embedding that shares it); untie it, {_OR_STAY}"
                )
        return limits


_OR_STAY = "or keep the boundary before it (max_fraction)"


def runs_twice(name: str) -> str:
    """The message for a layer that runs twice in one forward pass."""
    return (
        f"layer '{name}' runs twice in one forward pass, so it has no single input and output to learn from; "
        f"give each use a module of its own, {_OR_STAY}"
    )


def trace(model: nn.Module, example_inputs: Any, wants: Wants = lambda parameter: parameter.requires_grad) -> Order:
    """The order found by a forward pass of `model` on `example_inputs`.

    The model and the random generators stay as they were. The pass runs in training mode, to find layers that only
    training uses. It normalises by running statistics, so one example is enough. If the pass leaves a layer out (some
    networks skip blocks at random), a pass in evaluation mode adds it.

    Args:
        example_inputs: one tensor, a tuple of positional arguments, or a dict of keyword arguments.
        wants: whether the user wants a parameter to learn.
    """
    if isinstance(example_inputs, dict):
        return _trace(model, (), example_inputs, wants)
    return _trace(model, example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}, wants)


def _trace(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], wants: Wants) -> Order:
    return _completed(model, _run(model, inputs, keywords, wants, training=True), inputs, keywords, wants)


def _completed(
    model: nn.Module, order: Order, inputs: tuple[Any, ...], keywords: Mapping[str, Any], wants: Wants
) -> Order:
    """`order` of a training pass, with the further layers that a pass in evaluation mode runs."""
    if len(order.layers) == len(weight_layers(model)):
        return order
    try:
        whole = _run(model, inputs, keywords, wants, training=False)
    except Exception:  # a network may need other inputs in evaluation mode; a later pass shows the other layers
        return order
    return whole.merged(order)


def _run(
    model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], wants: Wants, *, training: bool
) -> Order:
    with unchanged(model), _uncompiled(), torch.no_grad(), Tracer(model, wants) as tracer:
        model.train(training)
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.eval()
        model(*inputs, **keywords)
    return tracer.order()


def _uncompiled() -> Any:
    """Runs compiled parts eagerly; loads the compiler only if something has used it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
