"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): every mini-batch skips some residual blocks.

Block l of n takes part in a mini-batch with probability p_l = 1 - l/n (1 - p_L). A dropped block is its shortcut alone:
its branch runs neither forward nor backward. In evaluation every branch takes part, scaled by p_l. Weights of a dropped
block have no gradient in that step: neither momentum nor weight decay changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError
from lowcal.hooks import Hook
from lowcal.method_settings import StochasticDepthSettings
from lowcal.methods.base import Method
from lowcal.methods.residual import ResidualBlock, residual_blocks
from lowcal.steps.optimizing import fill_momentum


class StochasticDepth(Method):
    """SGD on a network of smaller, random depth in every mini-batch.

    A pass in training mode is a mini-batch. The network itself is changed only while a pass runs.
    """

    name: ClassVar[str] = "stochastic-depth"
    section: ClassVar[str] = "stochastic_depth"
    settings: StochasticDepthSettings
    unreplayable: ClassVar[str | None] = "other blocks run in each step"

    def _attach(self, example_inputs: Tensor) -> tuple[str, ...]:
        self._blocks = residual_blocks(self.model)
        if not self._blocks:
            raise LowcalError(
                f"stochastic-depth drops residual blocks, and {type(self.model).__name__} has none that it knows; "
                "use it with a ResNet, RegNet, MobileNet, EfficientNet, ConvNeXt, Swin or ViT, or train this network "
                "by another method"
            )
        layers = super()._attach(example_inputs)
        count = len(self._blocks)
        self.survival = tuple(1 - number / count * (1 - self.settings.survival) for number in range(1, count + 1))
        if self.settings.survival < 1:
            fill_momentum(self.optimizer)
        # On the processor, whatever the device, so that all ranks draw the same and no step waits.
        self._generator = torch.Generator().manual_seed(self.seed)
        self._fixed: tuple[bool, ...] | None = None
        self._dropped: list[nn.Module] = []
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(Hook(self._begin)),
            self.model.register_forward_hook(Hook(self._end), always_call=True),
        ]
        self._scales: list[RemovableHandle] = []
        return layers

    def parallel(self, **ddp_options: Any) -> nn.Module:
        """DDP that looks in every step for the blocks without gradients, which are the same in all processes."""
        return super().parallel(find_unused_parameters=min(self.survival) < 1, **ddp_options)

    def expected_flops(self, step: Callable[[], Any], count: Callable[[Callable[[], Any]], int]) -> float:
        """The expectation over all gates: a step of all blocks, less each branch's FLOPs times its chance to drop."""
        shapes: list[torch.Size] = []
        handles = [
            block.module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
            for block in self._blocks
        ]
        self._fixed = (True,) * len(self._blocks)
        try:
            flops = float(count(step))
        finally:
            self._fixed = None
            for handle in handles:
                handle.remove()
        for block, shape, probability in zip(self._blocks, shapes, self.survival, strict=True):
            images = next(block.module.parameters()).new_empty(shape).requires_grad_()
            whole = count(partial(_pass, block.module, images))
            flops -= (1 - probability) * (whole - count(partial(_pass, block.without_branch, images)))
        return flops

    def state_dict(self) -> dict[str, Any]:
        """The blocks, and the state of the generator that draws the gates."""
        return {"blocks": [block.name for block in self._blocks], "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the generator."""
        names = [block.name for block in self._blocks]
        if state.get("blocks") != names:
            raise LowcalError(
                f"stochastic-depth: the state is of residual blocks {state.get('blocks')}, this network has {names}; "
                "load it into the network that it was saved from"
            )
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise LowcalError(
                "stochastic-depth: the state's generator is missing or damaged; use another checkpoint"
            ) from error
        self._generator = generator

    def detach(self) -> None:
        """Removes the hooks. The plain network remains, whose branches are not scaled."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _gates(self) -> list[bool]:
        draws = torch.rand(len(self._blocks), generator=self._generator, dtype=torch.float64).tolist()
        return [draw < probability for draw, probability in zip(draws, self.survival, strict=True)]

    def _begin(self, model: nn.Module, _: Any) -> None:
        self._restore()
        if not model.training:
            for block, probability in zip(self._blocks, self.survival, strict=True):
                if probability < 1:
                    self._scales += [last.register_forward_hook(partial(_scale, probability)) for last in block.lasts]
            return
        for block, gate in zip(self._blocks, self._fixed or self._gates(), strict=True):
            if not gate:
                self._drop(block)

    def _drop(self, block: ResidualBlock) -> None:
        # The instance's forward hides its class's until the pass has ended: no hook could keep that one from running.
        block.module.forward = block.without_branch
        self._dropped.append(block.module)

    def _end(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for module in self._dropped:
            del module.forward
        self._dropped.clear()
        for handle in self._scales:
            handle.remove()
        self._scales.clear()


def _scale(probability: float, branch: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return probability * output


def _pass(forward: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """A forward and a backward pass."""
    forward(images).sum().backward()
