"""LoCal: the controller that joins layers, rule, schedule and supervision; its hooks and its parts' go with it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.claims import check_free, check_held, claim, release
from lowcal.discovery import Discovery
from lowcal.errors import LowcalError, is_count
from lowcal.hooks import Hook
from lowcal.layers import Order, block_ends, own_parameters, recurring_block, trace, weight_layers
from lowcal.rules import Hebbian, Rule
from lowcal.running_norm import RunningNorms
from lowcal.schedule import NormTrend, Progress, Schedule
from lowcal.state import check_state
from lowcal.step_norms import StepNorms
from lowcal.supervision import LossTrend, Supervision
from lowcal.updates import LocalUpdates
from lowcal.window import Exchange


class LoCal:
    """Lets the first layers of a network learn locally while the rest goes on with its optimizer.

    Layers are numbered in the order in which the forward pass runs them. Those before the boundary take no part in
    back-propagation: they need no gradient, and `rule` updates their weights from what passes through them, right after
    each ``optimizer.step()``. Training starts with boundary 0, which is plain training; `end_epoch` moves the boundary.

    Args:
        model: any network with linear or convolution layers. Its classes and ``state_dict`` keys stay as they are.
        optimizer: the optimizer that holds the model's parameters. Its ``param_groups`` stay as they are.
        epochs: epochs in the whole training, E_max.
        rule: what local layers do: `Hebbian` (the paper's), `Frozen`, `Refresh`, or one of your own.
        schedule: where the boundary is: `NormTrend` (Algorithm 1), `Quadratic` (Eq. 3), `Fixed`.
        supervision: the sign of local updates: `LossTrend` (Algorithm 2); None: always +1.
        norm_stats: how normalisation layers before the boundary normalise in training: by "batch" statistics, going on
            to update the running ones, or by the "running" statistics, unchanged.
        example_inputs: one input of the model (a tensor, a tuple of arguments or a dict of keyword arguments), from
            which the order of layers is known at once; without it, it is known after the first forward pass.

    Raises:
        LowcalError: an argument is out of range; the model has no layer, a lazy one, one that the optimizer does not
            hold, or one that another controller has.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> local = LoCal(model, optimizer, epochs=90, example_inputs=torch.zeros(1, 4))
        >>> local.layers, local.boundary
        (('0', '2'), 0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        epochs: int,
        rule: Rule = Hebbian(),  # noqa: B008  (immutable)
        schedule: Schedule = NormTrend(),  # noqa: B008
        supervision: Supervision | None = LossTrend(),  # noqa: B008
        norm_stats: Literal["batch", "running"] = "batch",
        example_inputs: Any = None,
    ) -> None:
        if not is_count(epochs):
            raise LowcalError(
                f"LoCal: epochs is {epochs!r}; give the number of epochs of the whole training, at least 1"
            )
        if norm_stats not in ("batch", "running"):
            raise LowcalError(f"LoCal: norm_stats is {norm_stats!r}; choose 'batch' or 'running'")
        if not isinstance(rule, Rule):
            raise LowcalError(
                f"LoCal: {rule!r} is no rule; give lowcal.Hebbian(), Frozen(), Refresh() or one like them"
            )
        measure = getattr(schedule, "measure", "epoch")
        if measure not in ("epoch", "step"):
            raise LowcalError(f"LoCal: the schedule's measure is {measure!r}; choose 'epoch' or 'step'")
        self._candidates = weight_layers(model)
        check_held(self._candidates, optimizer)
        check_free(self._candidates)
        self.model, self.optimizer, self.epochs = model, optimizer, epochs
        self.rule, self.schedule, self.supervision, self.norm_stats = rule, schedule, supervision, norm_stats

        self.epoch = 0
        self.boundary = 0
        self.sign = 1
        self.change: float | None = None
        self.history: tuple[tuple[int, int], ...] = ()
        self.generation = 0  # counts the changes of which parameters are local (`DistributedLoCal`)
        self._losses: tuple[float, ...] = ()
        self._changes: tuple[float, ...] = ()
        self._earlier: tuple[tuple[int, float], ...] = ()  # T and ||dW_E|| of the epochs before the last move
        self._remembers = getattr(schedule, "remembers", False)
        self._start: Tensor | None = None  # the transition layer's weight when the epoch began

        self._discovery = Discovery(model, self._candidates, self._take)
        self._modules: list[nn.Module] = []
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._block = 1
        self._ends: tuple[int, ...] = ()
        self._required: dict[nn.Parameter, bool] = {}  # requires_grad of local layers' parameters before the move
        self._exchange: Exchange | None = None  # set for data-parallel training

        self._updates = LocalUpdates(model, rule)
        self._set_step()
        self._running_norms = RunningNorms(model)
        self._step_norms = StepNorms(optimizer) if measure == "step" else None
        self._handles: list[RemovableHandle] = []
        handles = [part.handles for part in (self._discovery, self._updates, self._running_norms)]
        handles += [self._step_norms.handles] if self._step_norms else []
        self._finalizer = weakref.finalize(self, _remove, self._handles, *handles)
        if example_inputs is not None:
            self._discovery.take(trace(model, example_inputs))
        else:
            self._discovery.watch_next_forward()
        claim(self._candidates, self)

    # What a user reads

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in execution order; empty until a forward pass has shown it."""
        return self._discovery.order.layers

    @property
    def lr(self) -> float:
        """The length eta of local steps in the present epoch, without the sign.

        Where it differs from layer to layer (``decay_from="switch"``): that of the layers that became local last.
        """
        if not self._counts_from_switch:
            return self.rule.step_size(self.epoch)
        return self.rule.step_size(self.epoch - self.history[-1][0] if self.history else 0)

    @property
    def skipped(self) -> int:
        """Layers' updates left out so far because their norm was zero or not finite. Reads from the device."""
        return self._updates.skipped

    # What a user calls

    def end_epoch(self, loss: float | Tensor) -> bool:
        """Ends an epoch: the loss sets the sign of local updates, the transition layer's change the boundary.

        Args:
            loss: mean training loss of the epoch.

        Returns:
            Whether the boundary moved, so that whatever depends on ``requires_grad`` must be built anew.

        Raises:
            LowcalError: `loss` is not finite, the model has not run since this controller was made, or it is detached.
        """
        try:
            loss = float(loss)
        except (TypeError, ValueError):
            raise LowcalError(f"end_epoch: the loss is {loss!r}; give the mean training loss, a number") from None
        self._check_ready("end_epoch")
        change = self._measure()
        if self._exchange is not None:
            loss, change = self._exchange.mean(loss, change)
        if not math.isfinite(loss):
            raise LowcalError(
                f"end_epoch: the mean training loss of epoch {self.epoch} is {loss}; training has diverged, "
                "so lower the learning rate and go on from an earlier checkpoint"
            )
        changes = (*self._changes, change)
        target = self.schedule(
            Progress(
                epoch=self.epoch + 1,
                epochs=self.epochs,
                layers=len(self.layers),
                block=self._block,
                boundary=self.boundary,
                changes=changes,
                ends=self._ends,
                earlier=self._earlier if self._remembers else None,
            )
        )
        self._check_target(target)
        self.epoch += 1
        self.change, self._changes = change, changes
        self._losses = (*self._losses, loss)
        self.sign = self.supervision(self._losses) if self.supervision else 1
        moved = target > self.boundary
        if moved:
            self._move(target)
        self._set_step()
        self._mark_start()
        return moved

    def move_to(self, boundary: int) -> None:
        """Sets the boundary by hand: the first `boundary` layers learn locally from the next step on.

        Raises:
            LowcalError: `boundary` is less than the present one or leaves no layer to SGD, the order of layers is not
                known yet, or this controller is detached.
        """
        self._check_ready("move_to")
        self._check_target(boundary)
        if boundary > self.boundary:
            self._move(boundary)
            self._set_step()
            self._mark_start()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step and epoch depend on, as plain values and tensors."""
        order = self._discovery.order
        readings: dict[str, Any] = {}
        if self._remembers:
            readings["earlier"] = [list(norm) for norm in self._earlier]
        if self._step_norms is not None:
            readings["step_norms"] = self._step_norms.sums()
        return {
            "format": 1,
            "layers": list(self.layers),
            "followers": dict(order.followers),
            "norms": dict(order.norms),
            "epoch": self.epoch,
            "boundary": self.boundary,
            "history": [list(move) for move in self.history],
            "sign": self.sign,
            "change": self.change,
            "losses": list(self._losses),
            "changes": list(self._changes),
            "steps": self._updates.steps,
            "skipped": self.skipped,
            "start": None if self._start is None else self._start.clone(),
            **readings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the controller that gave `state` was; model and optimizer are loaded before or after.

        Raises:
            LowcalError: `state` is no such state, belongs to another network, or is behind the present boundary;
                nothing has changed then.
        """
        order = check_state(
            state,
            self.model,
            self._candidates,
            self.layers,
            self.boundary,
            remembers=self._remembers,
            by_step=self._step_norms is not None,
        )
        if order.layers:
            self._discovery.take(order)
            if state["boundary"] > self.boundary:
                self._move(state["boundary"])
            self._start = state["start"].to(self._weight(self.boundary).device, copy=True)
            if self._step_norms is not None:
                self._step_norms.start(self._modules[self.boundary], state["step_norms"])
        self.epoch, self.sign, self.change = state["epoch"], state["sign"], state["change"]
        self.history = tuple((epoch, boundary) for epoch, boundary in state["history"])
        self._losses, self._changes = tuple(state["losses"]), tuple(state["changes"])
        self._earlier = tuple((boundary, norm) for boundary, norm in state.get("earlier", ()))
        self._updates.resume(state["steps"], state["skipped"])
        self._set_step()
        self._open()

    def detach(self) -> None:
        """Removes every hook and gives the local layers' parameters their ``requires_grad`` back."""
        self._finalizer()
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        self._required.clear()
        self._updates.clear()
        self._running_norms.restore()
        self.generation += 1
        release(self._candidates, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        where = f"boundary={self.boundary} of {len(self.layers)} layers, epoch={self.epoch} of {self.epochs}"
        return f"LoCal({where}, rule={self.rule})"

    # What `DistributedLoCal` calls

    def over_ranks(self, exchange: Exchange) -> None:
        """Sums local updates and averages losses over the ranks of `exchange` from now on."""
        self._exchange = exchange
        self._updates.over_ranks(exchange)

    def begin_forward(self) -> None:
        """Begins a data-parallel forward pass."""
        self._updates.begin_forward()

    def end_forward(self) -> None:
        """Ends a data-parallel forward pass: its updates are summed even if the last local layer did not run."""
        self._updates.end_forward()

    @property
    def is_open(self) -> bool:
        """Whether local layers take part in the coming step's back-propagation (`Refresh`)."""
        return self.rule.opens and self.is_due

    def opened(self) -> list[nn.Parameter]:
        """The parameters of local layers that learn by the optimizer in open steps."""
        return [parameter for parameter, required in self._required.items() if required and self.rule.opens]

    def update_bytes(self) -> int:
        """Bytes of local updates that a step makes, on average over the steps, in single precision at least."""
        return self._updates.bytes_per_step()

    # What replaying a step calls

    @property
    def is_due(self) -> bool:
        """Whether the rule acts in the coming step."""
        return self._updates.is_due

    def make_replayable(self, device: torch.device) -> None:
        """Lets a step depend on this object through what lies on `device`, so that a CUDA graph can replay it.

        A step is then what the device was recorded to do in it, and `count_step`.
        """
        self._updates.make_replayable(device)
        if self._step_norms is not None:
            self._step_norms.make_replayable(device)

    def count_step(self) -> None:
        """Counts an optimizer step, and opens or closes local layers for the next one."""
        self._updates.steps += 1
        if self.rule.opens:
            self._open()

    # The order of layers

    def _take(self, order: Order) -> None:
        self.schedule.check(len(order.layers), self.epochs)
        transition = self.layers[self.boundary] if self.layers else None
        self._modules = [self._candidates[name] for name in order.layers]
        self._parameters = own_parameters(order, self.model)
        self._block = recurring_block(self.model, order.layers)
        self._ends = block_ends(self.model, order.layers)
        if order.layers[self.boundary] != transition:
            self._mark_start()

    def _check_ready(self, caller: str) -> None:
        if not self._finalizer.alive:
            raise LowcalError(f"{caller}: this LoCal was detached from its model; build a new one to go on")
        if not self.layers:
            raise LowcalError(
                f"{caller}: the order of layers is not known, since the model has not run under LoCal; "
                "call the model itself (not its parts), or give LoCal example_inputs"
            )

    # The boundary

    def _weight(self, index: int) -> Tensor:
        return self._modules[index].weight.detach()  # type: ignore[operator]

    def _mark_start(self) -> None:
        self._start = self._weight(self.boundary).clone()
        if self._step_norms is not None:
            self._step_norms.start(self._modules[self.boundary])

    def _measure(self) -> float:
        """||dW_E|| of the epoch that ends, on this rank."""
        if self._step_norms is not None:
            return self._step_norms.mean()
        weight = self._weight(self.boundary)
        return float(torch.linalg.vector_norm(weight - self._start.to(weight.device)))  # type: ignore[union-attr]

    @property
    def _counts_from_switch(self) -> bool:
        return getattr(self.rule, "decay_from", "start") == "switch"

    def _set_step(self) -> None:
        """Sets eta with its sign for the coming steps: one for all local layers, or one for each."""
        if not self._counts_from_switch:
            self._updates.set_step(self.sign * self.lr)
            return
        steps: list[float] = []
        for switched, boundary in self.history:
            steps += [self.sign * self.rule.step_size(self.epoch - switched)] * (boundary - len(steps))
        self._updates.set_step(steps)

    def _check_target(self, target: int) -> None:
        if not is_count(target, least=self.boundary) or target >= len(self.layers):
            raise LowcalError(
                f"the boundary cannot move to {target!r}: it is at {self.boundary} and never moves back, and of the "
                f"{len(self.layers)} layers the last learns by SGD; "
                f"give a whole number from {self.boundary} to {len(self.layers) - 1}"
            )

    def _move(self, target: int) -> None:
        if not self.boundary:
            self._handles.append(self.optimizer.register_step_post_hook(Hook(self._after_step)))
            self._updates.watch(self._modules)
        newly_local = self.layers[self.boundary : target]
        for index, name in enumerate(newly_local, start=self.boundary):
            self._updates.add(index, name, self._modules[index])
            for parameter in self._parameters[name]:
                self._required[parameter] = parameter.requires_grad
                if not self.rule.opens:
                    self.optimizer.state.pop(parameter, None)
        if self.norm_stats == "running":
            norms = self._discovery.order.norms.items()
            local = self.layers[:target]
            self._running_norms.take([self.model.get_submodule(name) for name, layer in norms if layer in local])
        self._open()
        self.generation += 1
        before, self.boundary = self.boundary, target
        self._discovery.settled = target
        self.history = (*self.history, (self.epoch, target))
        self._earlier, self._changes = (*self._earlier, *((before, norm) for norm in self._changes)), ()

    def _open(self) -> None:
        """Lets local layers take part in the coming step's back-propagation, if it is one of those of the rule."""
        is_open = self.is_open
        for parameter, required in self._required.items():
            parameter.requires_grad_(required and is_open)
            if not is_open:
                parameter.grad = None  # a stale gradient would count in clipping, and be applied

    # The step

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.count_step()
        self._updates.apply(optimizer)


def _remove(*lists: list[RemovableHandle]) -> None:
    for handles in lists:
        for handle in handles:
            handle.remove()
        handles.clear()
