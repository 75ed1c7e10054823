"""LoCal: the controller that joins layers, rule, schedule and supervision; its hooks and its parts' go with it."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.arguments import bare_network, bare_optimizers, check_held, check_unsharded, holder
from lowcal.claims import check_free, claim, release
from lowcal.discovery import Discovery, trace
from lowcal.errors import LowcalError, is_count
from lowcal.hooks import Hook
from lowcal.layers import Order, block_ends, own_parameters, recurring_block, weight_layers, weight_of
from lowcal.rules import Hebbian, Rule
from lowcal.running_norm import RunningNorms
from lowcal.schedule import NormTrend, Progress, Schedule, reach
from lowcal.state import check_state, completed
from lowcal.step_norms import StepNorms
from lowcal.summary import summary
from lowcal.supervision import LossTrend, Supervision
from lowcal.trainable import TrainableParameters
from lowcal.updates import LocalUpdates
from lowcal.window import Exchange


class LoCal:
    """Lets the first layers of a network learn locally while the rest goes on with its optimizer.

    Layers are numbered in the order in which the forward pass runs them. Those before the boundary take no part in
    back-propagation: they need no gradient, and `rule` updates their weights from what passes through them, right after
    each ``optimizer.step()``. Training starts with boundary 0, which is plain training; `end_epoch` moves the boundary.

    Args:
        model: any network with linear or convolution layers. Its classes and ``state_dict`` keys stay as they are.
        optimizer: the optimizer that holds the model's parameters, or a list of several. ``param_groups`` stay as they
            are. Of several, a step of the one that holds the last layer ends a training step.
        epochs: epochs in the whole training, E_max.
        rule: what local layers do: `Hebbian` (the paper's), `Frozen`, `Refresh`, or one of your own.
        schedule: where the boundary is: `NormTrend` (Algorithm 1), `Quadratic` (Eq. 3), `Fixed`.
        supervision: the sign of local updates: `LossTrend` (Algorithm 2); None: always +1.
        norm_stats: how normalisation layers before the boundary normalise in training: by "batch" statistics, going on
            to update the running ones, or by the "running" statistics, unchanged.
        example_inputs: one input of the model (a tensor, a tuple of arguments or a dict of keyword arguments), from
            which the order of layers is known at once; without it, it is known after the first forward pass.

    Raises:
        LowcalError: an argument is out of range; the model has no layer, a lazy one, one that another controller has,
            or among those that the schedule can reach one that cannot become local or that no optimizer holds.

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
        optimizer: Optimizer | Sequence[Optimizer],
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
        for name, value, examples in (
            ("rule", rule, "lowcal.Hebbian(), Frozen(), Refresh()"),
            ("schedule", schedule, "lowcal.NormTrend(), Quadratic(c1, c2), Fixed({epoch: layers})"),
            ("supervision", supervision, "lowcal.LossTrend(), None"),
        ):
            if isinstance(value, type) or (name == "rule" and not isinstance(value, Rule)):
                raise LowcalError(f"LoCal: {name} is {value!r}; give an object, such as {examples} or one like them")
        measure = getattr(schedule, "measure", "epoch")
        if measure not in ("epoch", "step"):
            raise LowcalError(f"LoCal: the schedule's measure is {measure!r}; choose 'epoch' or 'step'")
        self.model = bare_network(model)
        self._optimizers = bare_optimizers(optimizer)
        self.optimizer = self._optimizers[0]
        self._candidates = weight_layers(self.model)
        self._trainable = TrainableParameters(self.model)
        check_free(self._candidates)
        if all(holder(weight_of(layer), self._optimizers) is None for layer in self._candidates.values()):
            check_held(self._candidates, self._optimizers, self._trainable.wants)
        self.epochs, self.norm_stats = epochs, norm_stats
        self.rule, self.schedule, self.supervision = rule, schedule, supervision

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

        self._discovery = Discovery(self.model, self._take)
        self._modules: list[nn.Module] = []
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._block = 1
        self._ends: tuple[int, ...] = ()
        self._leader = self.optimizer  # the optimizer whose steps are the training steps
        self._exchange: Exchange | None = None  # set for data-parallel training

        self._updates = LocalUpdates(self.model, rule)
        self._set_step()
        self._running_norms = RunningNorms(self.model)
        self._step_norms = StepNorms() if measure == "step" else None
        self._handles: list[RemovableHandle] = []
        parts = (self._discovery, self._updates, self._running_norms)
        handles = (self._handles, *(part.handles for part in parts))
        self._finalizer = weakref.finalize(self, _remove, *handles)
        if example_inputs is not None:
            self._discovery.take(trace(self.model, example_inputs))
        else:
            self._discovery.watch_next_forward()
        for each in self._optimizers:
            self._handles.append(each.register_step_pre_hook(Hook(self._before_step)))
            self._handles.append(each.register_step_post_hook(Hook(self._after_step)))
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
            LowcalError: `loss` is not finite, the model has not run since this controller was made, or it is detached;
                or the method was not carried out in this epoch: local layers made no update, or each of several
                processes made its own.
        """
        try:
            loss = float(loss)
        except (TypeError, ValueError):
            raise LowcalError(f"end_epoch: the loss is {loss!r}; give the mean training loss, a number") from None
        self._check_ready("end_epoch")
        self._check_carried_out()
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
        self._updates.epoch_counts = [0, 0, 0]
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
            "limits": dict(order.limits),
            "epoch": self.epoch,
            "boundary": self.boundary,
            "history": [list(move) for move in self.history],
            "sign": self.sign,
            "change": self.change,
            "losses": list(self._losses),
            "changes": list(self._changes),
            "steps": self._updates.steps,
            "skipped": self.skipped,
            "epoch_counts": list(self._updates.epoch_counts),
            "start": None if self._start is None else self._start.clone(),
            **readings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the controller that gave `state` was; model and optimizer are loaded before or after.

        Raises:
            LowcalError: `state` is no such state, belongs to another network, or is behind the present boundary;
                nothing has changed then.
        """
        state = completed(state)
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
            self._start = state["start"].to(self._transition().device, copy=True)
            if self._step_norms is not None:
                self._step_norms.start(self._transition(), self._optimizers, state["step_norms"])
        self.epoch, self.sign, self.change = state["epoch"], state["sign"], state["change"]
        self.history = tuple((epoch, boundary) for epoch, boundary in state["history"])
        self._losses, self._changes = tuple(state["losses"]), tuple(state["changes"])
        self._earlier = tuple((boundary, norm) for boundary, norm in state.get("earlier", ()))
        self._updates.resume(state["steps"], state["skipped"], state["epoch_counts"])
        self._set_step()
        self._open()

    def paused(self) -> AbstractContextManager[None]:
        """Within it, forward passes count for nothing: neither for local updates nor for a later step.

        A pass whose outputs are never back-propagated counts for nothing anyway, unless the whole model is compiled.
        """
        return self._updates.paused()

    def summary(self) -> str:
        """A few lines: which layers learn how, which parameters follow, what is left out and why."""
        return summary(self)

    def detach(self) -> None:
        """Removes every hook and gives the local layers' parameters their ``requires_grad`` back."""
        self._finalizer()
        self._trainable.release()
        self._updates.clear()
        self._running_norms.restore()
        self.generation += 1
        release(self._candidates, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LowcalError(
            "a LoCal cannot be copied or pickled, since it has hooks on its model and optimizer; "
            "save local.state_dict() and load it into a new LoCal"
        )

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
        return self._trainable.local if self.rule.opens else []

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
        """Counts an optimizer step that was replayed, and opens or closes local layers for the next one."""
        self._count_step(applied=self.is_due)

    # The order of layers

    def _take(self, order: Order) -> None:
        check_unsharded(self.model)
        candidates = weight_layers(self.model)
        if candidates != self._candidates:  # layers were wrapped or replaced since this object was made
            release(self._candidates, self)
            check_free(candidates)
            claim(candidates, self)
            self._candidates = candidates
        self._trainable.add_new(self.model)
        self.schedule.check(len(order.layers), self.epochs)
        self._check_reach(order, reach(self.schedule, len(order.layers)))
        transition = self.layers[self.boundary] if self.layers else None
        self._modules = [candidates[name] for name in order.layers]
        self._parameters = own_parameters(order, self.model)
        self._block = recurring_block(self.model, order.layers)
        holders = (holder(weight_of(module), self._optimizers) for module in reversed(self._modules))
        self._leader = next((optimizer for optimizer in holders if optimizer is not None), self.optimizer)
        self._ends = block_ends(self.model, order.layers)
        if order.layers[self.boundary] != transition:
            self._mark_start()

    def _check_reach(self, order: Order, boundary: int) -> None:
        """Checks that the first `boundary` layers can become local."""
        order.check_reach(boundary)
        layers = {name: self._candidates[name] for name in order.layers[:boundary]}
        check_held(layers, self._optimizers, self._trainable.wants)

    def _check_ready(self, caller: str) -> None:
        if not self._finalizer.alive:
            raise LowcalError(f"{caller}: this LoCal was detached from its model; build a new one to go on")
        if not self.layers:
            self._discovery.finish()
        if not self.layers:
            raise LowcalError(
                f"{caller}: the order of layers is not known, since the model has not run under LoCal; "
                "call the model itself (not its parts), or give LoCal example_inputs"
            )

    def _check_carried_out(self) -> None:
        """Checks that this epoch did what the method asks for, as far as the boundary does not show it."""
        self._check_ranks()
        if self.epoch == self.epochs:
            warnings.warn(
                f"end_epoch: epoch {self.epoch + 1} ends, but LoCal was built for epochs={self.epochs}, by which the "
                "schedule goes; give the number of epochs of the whole training",
                stacklevel=3,
            )
        acts = self.rule.collects or self.rule.opens
        if not (self.boundary and acts and self._updates.is_idle):
            return
        if self._updates.epoch_counts[0] == 0:
            cause = (
                "no step of the optimizer given to LoCal was seen: was it replaced, or is this a copy? "
                "Build LoCal anew with the optimizer in use and load the state_dict"
            )
        else:
            cause = (
                "the training passes ran in evaluation mode, under no_grad (reentrant checkpointing), "
                "within paused(), or not through the model; call model.train() and the model itself"
            )
        raise LowcalError(
            f"end_epoch: the first {self.boundary} layers are local, but made no update in epoch {self.epoch}; {cause}"
        )

    def _check_ranks(self) -> None:
        """Checks, before the boundary can move, that local updates are summed if several processes train."""
        if self._exchange is not None or not (self.rule.collects and dist.is_available() and dist.is_initialized()):
            return
        if dist.get_world_size() > 1:
            raise LowcalError(
                f"{dist.get_world_size()} processes train, and nothing sums their local updates, so that their weights "
                "would part; call lowcal.DistributedLoCal(model, local) instead of DDP, or take rule=lowcal.Frozen()"
            )

    # The boundary

    def _transition(self) -> nn.Parameter:
        """The transition layer's weight; if it computes that, and so is never local, another of its parameters."""
        weight = weight_of(self._modules[self.boundary])
        return self._parameters[self.layers[self.boundary]][0] if weight is None else weight

    def _mark_start(self) -> None:
        self._start = self._transition().detach().clone()
        if self._step_norms is not None:
            self._step_norms.start(self._transition(), self._optimizers)

    def _measure(self) -> float:
        """||dW_E|| of the epoch that ends, on this rank."""
        if self._step_norms is not None:
            return self._step_norms.mean()
        weight = self._transition().detach()
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
        self._check_reach(self._discovery.order, target)

    def _move(self, target: int) -> None:
        if not self.boundary:
            self._handles.append(self.model.register_forward_pre_hook(Hook(self._before_pass)))
            # Each layer's weight comes last, since that surely takes part in a backward pass.
            parameters = [parameter for name in self.layers for parameter in reversed(self._parameters[name])]
            self._updates.watch(parameters)
            if (last := self._last_of(parameters)) is not None:
                self._updates.watch_backward(last)
        for index in range(self.boundary, target):
            name, module = self.layers[index], self._modules[index]
            weight = weight_of(module)
            if weight is not None and self._trainable.wants(weight):
                self._updates.add(index, name, module)
            self._trainable.take(self._parameters[name])
            if not self.rule.opens:
                for optimizer in self._optimizers:
                    for parameter in self._parameters[name]:
                        optimizer.state.pop(parameter, None)
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

    def _last_of(self, parameters: Sequence[nn.Parameter]) -> nn.Parameter | None:
        """The last parameter that the leading optimizer moves; its gradient tells of each backward pass."""
        for parameter in reversed(parameters):
            if self._trainable.wants(parameter) and holder(parameter, (self._leader,)):
                return parameter
        return None

    def _open(self) -> None:
        """Lets local layers take part in the coming step's back-propagation, if it is one of those of the rule."""
        self._trainable.switch(self.is_open)

    # The step

    def _before_pass(self, module: nn.Module, inputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._trainable.close_again()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._trainable.begin_step()
        if self._step_norms is not None:
            self._step_norms.begin_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._trainable.end_step(optimizer)
        if self._step_norms is not None:
            self._step_norms.end_step(optimizer)
        if optimizer is not self._leader:
            return
        self._discovery.finish()
        self._trainable.note_wishes()
        if self.boundary:
            self._count_step(applied=self._updates.apply(optimizer))
        else:
            self._updates.epoch_counts[0] += 1

    def _count_step(self, *, applied: bool) -> None:
        self._updates.count_step(applied)
        if self.rule.opens:
            self._open()


def _remove(*lists: list[RemovableHandle]) -> None:
    for handles in lists:
        for handle in handles:
            handle.remove()
        handles.clear()
