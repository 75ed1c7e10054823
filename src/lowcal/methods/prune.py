"""PruneTrain (Lym et al. 2019, arXiv 1901.09290): a penalty drives channels to zero, and they are removed in training.

The penalty is the group lasso over the output channels and the input channels of each layer. Its one coefficient is
set at the first mini-batch, so that the penalty is a given part of the whole loss. A channel is removed when its
weights are zero in all layers that make or use it, including those that a residual sum ties together. The network's
output stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowcal.errors import LowcalError
from lowcal.method_settings import PruneSettings
from lowcal.methods.base import Fact, Method
from lowcal.methods.channel_groups import Group, cut, drop_parameters, find_groups
from lowcal.methods.residual import ResidualBlock, residual_blocks
from lowcal.strided import slice_inputs


class Prune(Method):
    """SGD with a group lasso on a network that loses channels every few epochs.

    A residual branch without channels is removed, and with it the constant that its last normalisation would add; the
    block is then its shortcut.
    """

    name: ClassVar[str] = "prune"
    section: ClassVar[str] = "prune"
    reshapes: ClassVar[bool] = True
    settings: PruneSettings

    def _attach(self, example_inputs: Tensor) -> tuple[str, ...]:
        layers = super()._attach(example_inputs)
        self._groups = {group.name: group for group in find_groups(self.model)}
        self._kept = {group.name: list(range(group.channels)) for group in self._groups.values()}
        self._blocks = {block.name: block for block in residual_blocks(self.model) if len(block.lasts) == 1}
        self._removed: list[str] = []
        self._finished = 0
        self._coefficient: Tensor | None = None
        return layers

    def penalty(self, loss: Tensor) -> Tensor | None:
        """The group lasso times its coefficient, which the first call sets from that mini-batch's `loss`.

        None if no prunable channel is left.
        """
        if not self._groups:
            return None
        lasso = self._lasso()
        if self._coefficient is None:
            ratio = self.settings.ratio
            self._coefficient = (ratio * loss / ((1 - ratio) * lasso)).detach()
        return self._coefficient * lasso

    def end_epoch(self, loss: float) -> bool:
        """Removes channels that are zero, after every `every` epochs.

        Raises:
            LowcalError: a layer that the network needs would have no channel left.
        """
        self._finished += 1
        return self._finished % self.settings.every == 0 and self._reconfigure()

    def facts(self) -> dict[str, Fact]:
        """Also the number of prunable channels, and the largest |weight| of the channel nearest to zero."""
        peaks = self._peaks(self._groups)
        smallest = float(torch.cat(peaks).min()) if peaks else None
        return {**super().facts(), "channels": sum(map(len, peaks)), "smallest_channel": smallest}

    def state_dict(self) -> dict[str, Any]:
        """The kept channels by their numbers in the unpruned network, and the penalty's coefficient."""
        return {
            "kept": {name: list(numbers) for name, numbers in self._kept.items()},
            "removed": list(self._removed),
            "finished": self._finished,
            "coefficient": None if self._coefficient is None else self._coefficient.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cuts the network and the optimizer to the shapes of `state`; their values are loaded afterwards."""
        self._check(state)
        self._shrink(state["kept"], state["removed"])
        self._finished = state["finished"]
        coefficient = state["coefficient"]
        device = next(self.model.parameters()).device
        self._coefficient = None if coefficient is None else coefficient.to(device, copy=True)

    def _lasso(self) -> Tensor:
        norms = []
        for group in self._groups.values():
            for name in group.makers:
                weight = self.model.get_submodule(name).get_parameter("weight")
                norms.append(torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim()))))
            for name in group.users:
                by_input = _by_input(self.model.get_submodule(name), group)
                norms.append(torch.linalg.vector_norm(by_input, dim=(0, *range(2, by_input.dim()))))
        return torch.cat(norms).sum()

    @torch.no_grad()
    def _peaks(self, groups: Mapping[str, Group]) -> list[Tensor]:
        """The largest |weight| of each channel in any layer, (channels,) for each group."""
        peaks = []
        for group in groups.values():
            own = [
                self.model.get_submodule(name).get_parameter("weight").abs().flatten(1).amax(1) for name in group.makers
            ]
            for name in group.users:
                weight = _by_input(self.model.get_submodule(name), group).abs()
                own.append(weight.amax(dim=(0, *range(2, weight.dim()))))
            peaks.append(torch.stack(own).amax(dim=0))
        return peaks

    def _alive(self, groups: Mapping[str, Group]) -> dict[str, list[bool]]:
        """Whether each channel of each group has a weight above the threshold; reads from the device once."""
        peaks = self._peaks(groups)
        flags = iter((~(torch.cat(peaks) < self.settings.threshold)).tolist() if peaks else [])
        return {name: [next(flags) for _ in range(group.channels)] for name, group in groups.items()}

    def _reconfigure(self) -> bool:
        groups, removed = self._groups, list(self._removed)
        while True:
            alive = self._alive(groups)
            empty = [group for name, group in groups.items() if not any(alive[name])]
            if not empty:
                break
            for group in empty:
                block = self._block_around(group)
                if block is None:
                    raise LowcalError(
                        f"prune has no channel left in layer '{group.name}', which the network cannot do without; "
                        f"lower prune.ratio, which is {self.settings.ratio:g}, or the learning rate"
                    )
                if block.name not in removed:
                    removed.append(block.name)
            groups = self._without(groups, removed)
        kept = {
            name: [number for number, is_alive in zip(self._kept[name], alive[name], strict=True) if is_alive]
            for name in groups
        }
        if kept == self._kept and removed == self._removed:
            return False
        self._shrink(kept, removed)
        return True

    def _shrink(self, kept: Mapping[str, list[int]], removed: list[str]) -> None:
        for name in removed:
            if name not in self._removed:
                self._remove_branch(self._blocks[name])
        self._removed = list(removed)
        self._groups = self._without(self._groups, removed)
        for name, group in self._groups.items():
            wanted = set(kept[name])
            places = [place for place, number in enumerate(self._kept[name]) if number in wanted]
            if len(places) < group.channels:
                cut(self.model, self.optimizer, group, torch.tensor(places))
                self._groups[name] = replace(group, channels=len(places))
                slice_inputs(self.model)  # a layer may have too few channels now
        self._kept = {name: list(kept[name]) for name in self._groups}

    def _remove_branch(self, block: ResidualBlock) -> None:
        rest = block.rest()
        rest.train(block.module.training)
        drop_parameters(self.optimizer, set(block.module.parameters()) - set(rest.parameters()))
        parent, _, own = block.name.rpartition(".")
        setattr(self.model.get_submodule(parent), own, rest)
        self.layers = tuple(layer for layer in self.layers if not _is_in_branch(layer, block))

    def _block_around(self, group: Group) -> ResidualBlock | None:
        """The residual block whose branch holds the whole group."""
        for block in self._blocks.values():
            if all(_is_in_branch(member, block) for member in group.members):
                return block
        return None

    def _without(self, groups: Mapping[str, Group], removed: list[str]) -> dict[str, Group]:
        """The groups without the modules in the removed blocks' branches."""
        blocks = [self._blocks[name] for name in removed]

        def left(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in names if not any(_is_in_branch(name, block) for block in blocks))

        rest: dict[str, Group] = {}
        for name, group in groups.items():
            makers, users, carriers = left(group.makers), left(group.users), left(group.carriers)
            if makers or users:
                rest[name] = replace(group, makers=makers, users=users, carriers=carriers)
        return rest

    def _check(self, state: Mapping[str, Any]) -> None:
        def refuse(what: str) -> LowcalError:
            return LowcalError(
                f"prune: the state {what}; load it into the network that it was saved from, before its training"
            )

        kept, removed = state.get("kept"), state.get("removed")
        if not isinstance(kept, dict) or not isinstance(removed, list) or not isinstance(state.get("finished"), int):
            raise refuse("is not one of prune, or is damaged")
        if not isinstance(state.get("coefficient", 0), Tensor | None):
            raise refuse("has no coefficient")
        strange = [name for name in removed if name not in self._blocks]
        if strange or removed[: len(self._removed)] != self._removed:
            raise refuse(f"has other residual blocks removed, {removed}")
        groups = self._without(self._groups, removed)
        if kept.keys() != groups.keys():
            raise refuse(f"is of layers {sorted(kept)}, this network's are {sorted(groups)}")
        for name, numbers in kept.items():
            own = set(self._kept[name])
            if not numbers or not own.issuperset(numbers) or sorted(set(numbers)) != numbers:
                raise refuse(f"keeps channels of layer '{name}' that this network does not have")


def _by_input(layer: nn.Module, group: Group) -> Tensor:
    """The layer's weight with the group's channels as its second dimension, (outputs, channels, ...)."""
    weight = layer.get_parameter("weight")
    return weight.unflatten(1, (group.channels, -1)) if isinstance(layer, nn.Linear) else weight


def _is_in_branch(name: str, block: ResidualBlock) -> bool:
    inside = f"{block.name}."
    if not name.startswith(inside):
        return False
    return block.shortcut_name is None or not f"{name}.".startswith(f"{inside}{block.shortcut_name}.")
