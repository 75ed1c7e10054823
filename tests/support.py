"""A plain training step in its usual spellings, and what a network and its optimizer look like from outside."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lowcal import LowcalError

ORDERS = ("before", "between", "after")  # where a loop calls zero_grad: before forward, before backward, after step

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=0.01, weight_decay=0.01),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def sgd(model: nn.Module) -> Optimizer:
    return OPTIMIZERS["sgd"](model.parameters())


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    *batches: tuple[Tensor, Tensor],
    order: str = "between",
    zero_grad: Callable[[], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    spoil: bool = False,
    clip: float | None = None,
) -> Tensor:
    """One optimizer step over the micro-batches; returns the last loss. `spoil` makes the last gradient infinite."""
    zero_grad = zero_grad or optimizer.zero_grad
    if order == "before":
        zero_grad()
    for index, (inputs, labels) in enumerate(batches):
        loss = nn.functional.cross_entropy(model(inputs), labels) / len(batches)
        if order == "between" and index == 0:
            zero_grad()
        if spoil and index == len(batches) - 1:
            loss = loss * torch.inf
        (scaler.scale(loss) if scaler else loss).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    if order == "after":
        zero_grad()
    return loss.detach()


def train_epoch(model: nn.Module, optimizer: Optimizer, local: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One epoch of the README's loop, its mean loss handed to `local` (None: plain SGD)."""
    model.train()
    losses = [train_step(model, optimizer, batch) for batch in batches]
    if local is not None:
        local.end_epoch(float(torch.stack(losses).mean()))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state_dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the entries of the state_dict that are not bitwise what they were."""
    after = model.state_dict()
    assert list(before) == list(after)
    return {name for name, value in before.items() if not same(value, after[name])}


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are bitwise equal; a NaN equals itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def hooks(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Every hook on a module, a parameter or the optimizer, and every attribute put on one of them, counted."""
    found: dict[str, int] = {}
    owners = [(f"module {name}", module) for name, module in model.named_modules()]
    owners += [(f"parameter {name}", parameter) for name, parameter in model.named_parameters()]
    owners += [("optimizer", optimizer)]
    for label, owner in owners:
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if isinstance(owner, Tensor) and getattr(owner, key):
                found[f"{label}.{key}"] = len(getattr(owner, key))
        for key, value in vars(owner).items():
            found[f"{label}.{key}"] = len(value) if "hook" in key and isinstance(value, dict) else 1
        found[f"{label}: {type(owner).__name__}"] = 1
    return {key: count for key, count in found.items() if count}


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a call which fails must leave as it was."""
    return {
        "weights": weights(model),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: p.grad is not None for name, p in model.named_parameters()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "hooks": hooks(model, optimizer),
        "rng": torch.get_rng_state(),
    }


@contextmanager
def refused(
    *names: object, model: nn.Module | None = None, optimizer: Optimizer | None = None, local: Any = None
) -> Iterator[None]:
    """Expects a LowcalError of one line with all `names` in it, which has changed nothing."""

    def everything() -> tuple[Any, Any]:
        return (
            snapshot(model, optimizer) if model is not None else None,
            local.state_dict() if local is not None else None,
        )

    before = copy.deepcopy(everything())
    with pytest.raises(LowcalError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 320
    for name in names:
        assert str(name) in message, message
    assert any(mark in message for mark in (";", ", so ", "give", "pass")), f"no remedy: {message}"
    assert same(before, everything())


def reached(model: nn.Module, outputs: Tensor) -> set[str]:
    """Names of the parameters that back-propagation from `outputs` reaches, read off the graph that autograd built."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: set[str] = set()
    seen: set[Any] = set()
    nodes = [outputs.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(names.get(id(variable), "?"))
        nodes += [following for following, _ in node.next_functions]
    return found
