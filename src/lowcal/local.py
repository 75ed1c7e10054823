"""LoCal: the controller that joins local layers, schedule and supervision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from lowcal.arguments import bare_network, bare_optimizers, check_settings
from lowcal.budget import Budget
from lowcal.dry_run import held_boundary
from lowcal.errors import LowcalError, is_count
from lowcal.layers import block_ends, recurring_block
from lowcal.local_layers import LocalLayers
from lowcal.rules import Hebbian, Rule
from lowcal.schedule import NormTrend, Progress, Schedule, reach, start
from lowcal.state import check_state, completed
from lowcal.step_times import StepTimes
from lowcal.supervision import LossTrend, Supervision


class LoCal:
    """Makes the first layers of a network learn locally while the optimizer trains the others.

    Layers are numbered in the order in which the forward pass runs them. Those before the boundary take no part in
    back-propagation. They need no gradient; `rule` updates their weights from their inputs and outputs, right after
    each ``optimizer.step()``. Training starts with boundary 0, which is plain training, unless the schedule says
    otherwise; `end_epoch` moves the boundary.

    Args:
        model: any network with linear or convolution layers. Its classes and ``state_dict`` keys stay as they are.
        optimizer: the optimizer that holds the model's parameters, or a list of several. ``param_groups`` stay as they
            are. With several, a training step ends when the one that holds the last layer has made its step.
        epochs: epochs in the whole training, E_max.
        rule: how local layers learn: `Hebbian` (the paper's), `Frozen`, `Refresh`, or your own.
        schedule: where the boundary is: `NormTrend` (Algorithm 1), `Quadratic` (Eq. 3), `Fixed`, or your own.
        supervision: the sign of local updates: `LossTrend` (Algorithm 2); None: always +1.
        norm_stats: how normalisation layers before the boundary normalise in training: by "batch" statistics, updating
            the running ones as usual, or by the "running" statistics, which then stay the same.
        example_inputs: one input of the model: a tensor, a tuple of arguments or a dict of keyword arguments. With it
            the order of layers is known at once, otherwise after the first forward pass. A schedule with local layers
            from the start needs it; ``Budget(memory=...)`` needs a whole mini-batch.

    Attributes:
        model: the network, without the wrapper that `torch.compile` puts around it.
        optimizer: the first of the optimizers, without a wrapper.
        epochs, rule, schedule, supervision, norm_stats: as given.
        epoch: epochs that have ended.
        sign: +1 or -1, the sign of local updates in this epoch.
        lr: eta, the length of local steps in this epoch, without the sign. If it differs from layer to layer
            (``decay_from="switch"``), that of the layers that became local last.
        change: ||dW_E|| of the transition layer in the last epoch; None before the first has ended.
        history: (epoch, boundary) of each move.

    Raises:
        LowcalError: an argument is out of range; the model has no layer, or a lazy one, or one that another controller
            has; or the schedule can reach a layer that cannot become local or that no optimizer holds.

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
        measure = check_settings(epochs, norm_stats, rule, schedule, supervision)
        self.model = bare_network(model)
        optimizers = bare_optimizers(optimizer)
        self.optimizer = optimizers[0]
        self.epochs, self.norm_stats = epochs, norm_stats
        self.rule, self.schedule, self.supervision = rule, schedule, supervision

        self.epoch = 0
        self.sign = 1
        self.lr = 0.0
        self.change: float | None = None
        self.history: tuple[tuple[int, int], ...] = ()
        self._losses: tuple[float, ...] = ()
        self._changes: tuple[float, ...] = ()
        self._earlier: tuple[tuple[int, float], ...] = ()  # T and ||dW_E|| of the epochs before the last move
        self._remembers = getattr(schedule, "remembers", False)
        self._times = StepTimes() if getattr(schedule, "measures", False) else None

        def checked_reach(depth: int) -> int:
            schedule.check(depth, epochs)
            return reach(schedule, depth)

        self._local_layers = LocalLayers(
            self.model, optimizers, rule, norm_stats=norm_stats, measure=measure, reach=checked_reach
        )
        if example_inputs is None and start(schedule, len(self._local_layers.candidates)):
            raise LowcalError(
                f"LoCal: {schedule} has local layers from the start, when the order of layers is not known; "
                "give example_inputs, one input of the model"
            )
        self._set_step()
        self._local_layers.attach(example_inputs, self._times.see if self._times else None)
        if first := start(schedule, len(self.layers)):
            if isinstance(schedule, Budget):
                order = self._local_layers.discovery.order
                first = held_boundary(schedule, self.model, optimizers, order, rule, example_inputs)
            self.move_to(first)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in execution order; empty until the first forward pass, without `example_inputs`."""
        return self._local_layers.names

    @property
    def boundary(self) -> int:
        """The number of leading layers that learn locally; `move_to` sets it."""
        return self._local_layers.boundary

    def end_epoch(self, loss: float | Tensor) -> bool:
        """Ends an epoch: sets the sign of local updates by the loss, and the boundary by the schedule.

        Args:
            loss: mean training loss of the epoch.

        Returns:
            Whether the boundary moved. Then rebuild whatever depends on ``requires_grad``.

        Raises:
            LowcalError: `loss` is not finite; the model has not run since this controller was made; it is detached;
                local layers made no update in this epoch; or several processes did not sum their updates.
        """
        try:
            loss = float(loss)
        except (TypeError, ValueError):
            raise LowcalError(f"end_epoch: the loss is {loss!r}; give the mean training loss, a number") from None
        local = self._local_layers
        local.check_ready("end_epoch")
        if self.epoch == self.epochs:
            warnings.warn(
                f"end_epoch: epoch {self.epoch + 1} ends, but LoCal was built for epochs={self.epochs}, on which the "
                "schedule depends; give the number of epochs of the whole training",
                stacklevel=2,
            )
        local.check_carried_out(self.epoch)
        change = local.transition_change()
        if local.exchange is not None:
            loss, change = local.exchange.mean(loss, change)
        if not math.isfinite(loss):
            raise LowcalError(
                f"end_epoch: the mean training loss of epoch {self.epoch} is {loss}; training has diverged, "
                "so lower the learning rate and go on from an earlier checkpoint"
            )
        changes = (*self._changes, change)
        if self._times:
            self._times.end_epoch(
                *(self.model, local.discovery.order, self.rule, local.updates.clock, local.exchange),
                boundary=self.boundary,
                most=reach(self.schedule, len(self.layers)),
            )
        target = self.schedule(self._progress(self.epoch + 1, changes))
        self._check_target(target)
        self.epoch += 1
        local.updates.epoch_counts = [0, 0, 0]
        self.change, self._changes = change, changes
        self._losses = (*self._losses, loss)
        self.sign = self.supervision(self._losses) if self.supervision else 1
        moved = target > self.boundary
        if moved:
            self._move(target)
        self._set_step()
        local.begin_epoch()
        return moved

    def move_to(self, boundary: int) -> None:
        """Moves the boundary by hand: the first `boundary` layers learn locally from the next step on.

        Raises:
            LowcalError: `boundary` is less than the present one or leaves no layer to SGD; the order of layers is not
                known yet; or this controller is detached.
        """
        self._local_layers.check_ready("move_to")
        self._check_target(boundary)
        if boundary > self.boundary:
            self._move(boundary)
            self._set_step()
            self._local_layers.begin_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Everything on which the next step and epoch depend, as plain values and tensors; resuming is exact."""
        local = self._local_layers
        order, updates = local.discovery.order, local.updates
        readings: dict[str, Any] = {}
        if self._remembers:
            readings["earlier"] = [list(norm) for norm in self._earlier]
        if local.change.by_step:
            readings["step_norms"] = local.change.sums()
        if self._times:
            readings["times"] = self._times.state_dict()
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
            "steps": updates.steps,
            "skipped": updates.skipped,
            "epoch_counts": list(updates.epoch_counts),
            "start": None if local.change.start is None else local.change.start.clone(),
            **readings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`; load model and optimizer before or after.

        Raises:
            LowcalError: `state` is damaged, belongs to another network, or is behind the present boundary. Nothing
                changes then.
        """
        local = self._local_layers
        state = completed(state)
        order = check_state(
            state,
            self.model,
            local.candidates,
            self.layers,
            self.boundary,
            remembers=self._remembers,
            by_step=local.change.by_step,
            times=self._times is not None,
        )
        if order.layers:
            local.discovery.take(order)
            if state["boundary"] > self.boundary:
                local.move_to(state["boundary"])
            local.resume_epoch(state["start"], state.get("step_norms", (0.0, 0.0)))
        self.epoch, self.sign, self.change = state["epoch"], state["sign"], state["change"]
        self.history = tuple((epoch, boundary) for epoch, boundary in state["history"])
        self._losses, self._changes = tuple(state["losses"]), tuple(state["changes"])
        self._earlier = tuple((boundary, norm) for boundary, norm in state.get("earlier", ()))
        if self._times:
            self._times.load_state_dict(state["times"])
        local.updates.resume(state["steps"], state["skipped"], state["epoch_counts"])
        self._set_step()
        local.open()

    def paused(self) -> AbstractContextManager[None]:
        """A context manager in which forward passes make no local updates.

        A pass whose outputs are never back-propagated has no effect anyway, unless the whole model is compiled.
        """
        return self._local_layers.updates.paused()

    def summary(self) -> str:
        """A few lines: how each layer learns, which parameters follow, what is left out and why."""
        name, depth = type(self.model).__name__, len(self.layers)
        if not self.layers:
            return f"{name}: the order of layers is not known yet; it shows in the next forward pass"
        head = (
            f"{name}: boundary {self.boundary} of {depth} layers after {self.epoch} of {self.epochs} epochs; "
            f"the schedule can move it to {reach(self.schedule, depth)}"
        )
        if hasattr(self.schedule, "describe"):
            head = "\n".join([head, *self.schedule.describe(self._progress(self.epoch, self._changes))])
        return "\n".join([head, *self._local_layers.summary()])

    def detach(self) -> None:
        """Removes every hook and gives the local layers' parameters their ``requires_grad`` back."""
        self._local_layers.detach()

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

    def _progress(self, epoch: int, changes: tuple[float, ...]) -> Progress:
        """What the schedule knows before the coming `epoch`."""
        return Progress(
            epoch=epoch,
            epochs=self.epochs,
            layers=len(self.layers),
            block=recurring_block(self.model, self.layers),
            boundary=self.boundary,
            changes=changes,
            ends=block_ends(self.model, self.layers),
            earlier=self._earlier if self._remembers else None,
            **(self._times.known() if self._times else {}),
        )

    def _set_step(self) -> None:
        """Sets eta with its sign for the coming steps: one for all local layers, or one for each."""
        updates = self._local_layers.updates
        if getattr(self.rule, "decay_from", "start") != "switch":
            self.lr = self.rule.step_size(self.epoch)
            updates.set_step(self.sign * self.lr)
            return
        self.lr = self.rule.step_size(self.epoch - self.history[-1][0] if self.history else 0)
        steps: list[float] = []
        for switched, boundary in self.history:
            steps += [self.sign * self.rule.step_size(self.epoch - switched)] * (boundary - len(steps))
        updates.set_step(steps)

    def _check_target(self, target: int) -> None:
        if not is_count(target, least=self.boundary) or target >= len(self.layers):
            raise LowcalError(
                f"the boundary cannot move to {target!r}: it is at {self.boundary} and never moves back, and of the "
                f"{len(self.layers)} layers the last learns by SGD; "
                f"give a whole number from {self.boundary} to {len(self.layers) - 1}"
            )
        local = self._local_layers
        local.check_reach(local.discovery.order, target)

    def _move(self, target: int) -> None:
        before = self.boundary
        self._local_layers.move_to(target)
        self.history = (*self.history, (self.epoch, target))
        self._earlier, self._changes = (*self._earlier, *((before, norm) for norm in self._changes)), ()
