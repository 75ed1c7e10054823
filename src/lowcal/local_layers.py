"""The local layers of one network: which layers are before the boundary, and how they take part in a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowcal.arguments import check_free, check_held, check_unsharded, claim, first_holder, holder, release
from lowcal.discovery import Discovery, trace
from lowcal.errors import LowcalError
from lowcal.hooks import Hook
from lowcal.layers import Order, is_adapted, own_parameters, weight_layers, weights_of
from lowcal.norms import RunningNorms
from lowcal.overlap import Overlap
from lowcal.rules import Rule
from lowcal.trainable import TrainableParameters
from lowcal.transition import TransitionChange
from lowcal.updates import LocalUpdates

if TYPE_CHECKING:
    from lowcal.parallel import Exchange


class LocalLayers:
    """Moves the boundary of a network and carries out local learning in each training step; owns every hook.

    `LoCal` decides when the boundary moves. `DistributedLoCal` and steps replayed by a CUDA graph call this object too.

    Args:
        model: the network.
        optimizers: the optimizers that hold its parameters.
        rule: what local layers do.
        norm_stats: as for `LoCal`.
        measure: how ||dW_E|| is measured, as `Schedule.measure` says.
        reach: returns the largest boundary for a number of layers; raises LowcalError if the schedule does not fit.

    Attributes:
        boundary: the number of leading layers that learn locally.
        generation: how often the set of local parameters changed; `DistributedLoCal` compares it.
        candidates: the network's possible layers by name.
        discovery: finds the order of the layers.
        trainable: which parameters learn by the optimizer.
        updates: the local updates.
        change: measures the transition layer's change.
        exchange: set for data-parallel training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        rule: Rule,
        *,
        norm_stats: Literal["batch", "running"],
        measure: Literal["epoch", "step"],
        reach: Callable[[int], int],
    ) -> None:
        self.boundary = self.generation = 0
        self.candidates = weight_layers(model)
        self.trainable = TrainableParameters(model)
        check_free(self.candidates)
        if first_holder(self.candidates.values(), optimizers) is None:
            check_held(self.candidates, optimizers, self.trainable.wants)
        self.discovery = Discovery(model, self._take, self.trainable.wants)
        self.updates = LocalUpdates(model, rule)
        self.change = TransitionChange(measure)
        self.exchange: Exchange | None = None
        self._model, self._optimizers, self._rule = model, optimizers, rule
        self._norm_stats, self._reach = norm_stats, reach
        self._leader = optimizers[0]  # the optimizer whose steps are the training steps
        self._modules: list[nn.Module] = []
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._running_norms = RunningNorms(model)
        self._handles: list[RemovableHandle] = []
        parts = (self.discovery, self.updates, self._running_norms)
        self._finalizer = weakref.finalize(self, _remove, self._handles, *(part.handles for part in parts))

    def attach(self, example_inputs: Any, see: Callable[..., None] | None = None) -> None:
        """Puts hooks on network and optimizers; traces `example_inputs`; `see` gets the arguments of each pass."""
        if see is not None:
            self._handles.append(self._model.register_forward_pre_hook(Hook(see), with_kwargs=True))
        if example_inputs is not None:
            self.discovery.take(trace(self._model, example_inputs, self.trainable.wants))
        else:
            self.discovery.watch_next_forward()
        for each in self._optimizers:
            self._handles.append(each.register_step_pre_hook(Hook(self._before_step)))
            self._handles.append(each.register_step_post_hook(Hook(self._after_step)))
        claim(self.candidates, self)

    def detach(self) -> None:
        """Removes every hook and gives the local layers' parameters their ``requires_grad`` back."""
        self._finalizer()
        self.trainable.release()
        self.updates.clear()
        self._running_norms.restore()
        self.generation += 1
        release(self.candidates, self)

    # The order of layers

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the known layers in execution order."""
        return self.discovery.order.layers

    def check_ready(self, caller: str) -> None:
        """Checks that this object is attached and the order of layers is known.

        Raises:
            LowcalError: it is not.
        """
        if not self._finalizer.alive:
            raise LowcalError(f"{caller}: this LoCal was detached from its model; build a new one to go on")
        if not self.names:
            self.discovery.finish()
        if not self.names:
            raise LowcalError(
                f"{caller}: the order of layers is not known, since the model has not run under LoCal; "
                "call the model itself (not its parts), or give LoCal example_inputs"
            )

    def check_reach(self, order: Order, boundary: int) -> None:
        """Checks that the first `boundary` layers can become local.

        Raises:
            LowcalError: one cannot.
        """
        order.check_reach(boundary)
        layers = {name: self.candidates[name] for name in order.layers[:boundary]}
        check_held(layers, self._optimizers, self.trainable.wants)

    def _take(self, order: Order) -> None:
        check_unsharded(self._model)
        candidates = weight_layers(self._model)
        if candidates != self.candidates:  # layers were wrapped or replaced since this object was made
            release(self.candidates, self)
            check_free(candidates)
            claim(candidates, self)
            self.candidates = candidates
        self.trainable.add_new(self._model)
        self.check_reach(order, self._reach(len(order.layers)))
        transition = self.names[self.boundary] if self.names else None
        self._modules = [candidates[name] for name in order.layers]
        self._parameters = own_parameters(order, self._model)
        self._leader = first_holder(reversed(self._modules), self._optimizers) or self._optimizers[0]
        if order.layers[self.boundary] != transition:
            self.change.begin(self._transition(order.layers), self._optimizers)

    def summary(self) -> list[str]:
        """Lines on local and other layers, on the parameters that follow them, and on what is left out and why."""
        order, names = self.discovery.order, self.names
        local, others = names[: self.boundary], names[self.boundary :]
        modules = dict(zip(local, self._modules, strict=False))
        kept = [layer for layer, module in modules.items() if not any(map(self.trainable.wants, weights_of(module)))]
        adapted = [layer for layer, module in modules.items() if is_adapted(module)]
        lines = [f"local, by {self._rule}: {_span(local)}"] if local else []
        lines.append(f"by the optimizer: {_span(others)}")
        if kept:
            lines.append(f"local, but with a weight that you froze: {', '.join(kept)}")
        if adapted:
            lines.append(f"local, with adapters, which make no local update: {', '.join(adapted)}")
        followers = sum(layer in local for layer in order.followers.values())
        lines.append(
            f"other parameters: {followers} of {len(order.followers)} follow local layers and keep their values; "
            f"normalisation before the boundary uses {self._norm_stats} statistics"
        )
        lines += [f"cannot become local: {reason}" for reason in order.limits.values()]
        absent = [layer for layer in weight_layers(self._model) if layer not in names]
        if absent:
            lines.append(f"not run so far, so not numbered: {', '.join(absent)}")
        return lines

    # The boundary

    def move_to(self, target: int) -> None:
        """Moves the boundary to `target`, from the next step on."""
        if not self.boundary:
            self._handles.append(self._model.register_forward_pre_hook(Hook(self._before_pass)))
            # Each layer's weight comes last, since it certainly takes part in a backward pass.
            parameters = [parameter for name in self.names for parameter in reversed(self._parameters[name])]
            self.updates.watch(parameters)
            if (last := self._last_of(parameters)) is not None:
                self.updates.watch_backward(last)
        for index in range(self.boundary, target):
            name, module = self.names[index], self._modules[index]
            if not is_adapted(module) and all(map(self.trainable.wants, weights_of(module))):
                self.updates.add(index, name, module)
            self.trainable.take(self._parameters[name])
            if not self._rule.opens:
                for optimizer in self._optimizers:
                    for parameter in self._parameters[name]:
                        optimizer.state.pop(parameter, None)
        if self._norm_stats == "running":
            norms = self.discovery.order.norms.items()
            local = self.names[:target]
            self._running_norms.take([self._model.get_submodule(name) for name, layer in norms if layer in local])
        self.open()
        self.generation += 1
        self.boundary = self.discovery.settled = target

    def begin_epoch(self) -> None:
        """Starts to measure the transition layer's change."""
        self.change.begin(self._transition(self.names), self._optimizers)

    def resume_epoch(self, start: Tensor, sums: Sequence[float]) -> None:
        """Goes on measuring the change from a saved state."""
        weights = self._transition(self.names)
        self.change.resume(weights, self._optimizers, start.to(weights[0].device, copy=True), sums)

    def transition_change(self) -> float:
        """||dW_E|| of the epoch that ends, on this rank. Reads from the device."""
        return self.change.norm(self._transition(self.names))

    def _transition(self, names: Sequence[str]) -> list[nn.Parameter]:
        """The transition layer's weights, or its first parameter if the weight is computed from others."""
        return weights_of(self._modules[self.boundary]) or self._parameters[names[self.boundary]][:1]

    def _last_of(self, parameters: Sequence[nn.Parameter]) -> nn.Parameter | None:
        """The last parameter that the leading optimizer trains; each backward pass changes its gradient."""
        for parameter in reversed(parameters):
            if self.trainable.wants(parameter) and holder(parameter, (self._leader,)):
                return parameter
        return None

    # The step

    @property
    def is_open(self) -> bool:
        """Whether local layers take part in the coming step's back-propagation (`Refresh`)."""
        return self._rule.opens and self.updates.is_due

    def open(self) -> None:
        """Sets whether local layers take part in the coming step's back-propagation, by `is_open`."""
        self.trainable.switch(self.is_open)

    def count_step(self, *, applied: bool) -> None:
        """Counts an optimizer step, and opens or closes local layers for the next one."""
        self.updates.count_step(applied)
        if self._rule.opens:
            self.open()

    def _before_pass(self, module: nn.Module, inputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.trainable.close_again()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.trainable.begin_step()
        self.change.begin_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.trainable.end_step(optimizer)
        self.change.end_step(optimizer)
        if optimizer is not self._leader:
            return
        self.discovery.finish()
        self.trainable.read_wishes()
        if self.boundary:
            self.count_step(applied=self.updates.apply(optimizer))
        else:
            self.updates.tick()

    # A step that is replayed

    @property
    def phase(self) -> int:
        """0 if the rule acts in the coming step, else 1; steps of one phase give the device the same work."""
        return int(self.boundary > 0 and not self.updates.acts)

    def make_replayable(self, device: torch.device) -> None:
        """Moves what a step depends on to `device`, so that a CUDA graph can replay it; then call `replayed`."""
        self.updates.make_replayable(device)
        self.change.make_replayable(device)

    def overlapped(self, overlap: Overlap) -> AbstractContextManager[None]:
        """Inside it, products of local updates run by `overlap`, where they can."""
        return self.updates.overlapped(overlap)

    def replayed(self) -> None:
        """Does the part of a step that runs in Python alone, after the device has replayed the rest."""
        if self.boundary:
            self.count_step(applied=self.updates.acts)
        else:
            self.updates.tick()

    # Several ranks

    def use_ranks(self, exchange: Exchange) -> None:
        """Sums local updates and averages losses over the ranks of `exchange` from now on."""
        self.exchange = exchange
        self.updates.use_ranks(exchange)

    def opened(self) -> list[nn.Parameter]:
        """The parameters of local layers that learn by the optimizer in open steps."""
        return self.trainable.local if self._rule.opens else []

    def check_carried_out(self, epoch: int) -> None:
        """Checks at the end of `epoch` that local layers learned in it.

        Raises:
            LowcalError: local layers made no update, or each of several processes made its own.
        """
        self._check_ranks()
        if not (self.boundary and (self._rule.collects or self._rule.opens) and self.updates.is_idle):
            return
        if self.updates.epoch_counts[0] == 0:
            cause = (
                "no step of the optimizer given to LoCal was seen: was it replaced, or is this a copy? "
                "Build a new LoCal with the optimizer in use and load the state_dict"
            )
        else:
            cause = (
                "the training passes ran in evaluation mode, under no_grad (reentrant checkpointing), "
                "within paused(), or not through the model; call model.train() and the model itself; "
                # A compiled network does not always see hooks that are added later.
                "for torch.compile set torch._dynamo.config.skip_nnmodule_hook_guards = False first"
            )
        raise LowcalError(
            f"end_epoch: the first {self.boundary} layers are local, but made no update in epoch {epoch}; {cause}"
        )

    def _check_ranks(self) -> None:
        """Checks, before the boundary can move, that local updates are summed if several processes train."""
        if self.exchange is not None or not (self._rule.collects and dist.is_available() and dist.is_initialized()):
            return
        if dist.get_world_size() > 1:
            raise LowcalError(
                f"{dist.get_world_size()} processes train, and nothing sums their local updates, so that their weights "
                "would part; call lowcal.DistributedLoCal(model, local) instead of DDP, or take rule=lowcal.Frozen()"
            )


def _span(layers: tuple[str, ...]) -> str:
    """The first and the last of `layers`, and how many there are.

    >>> _span(("a", "b", "c")), _span(("a",))
    ('a to c (3 layers)', 'a (1 layer)')
    """
    ends = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
    return f"{ends} ({len(layers)} layer{'s' * (len(layers) > 1)})"


def _remove(*lists: list[RemovableHandle]) -> None:
    for handles in lists:
        for handle in handles:
            handle.remove()
        handles.clear()
