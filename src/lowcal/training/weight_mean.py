"""The exponential mean of a network's weights over the steps of a run, with which it is evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lowcal.errors import LowcalError
from lowcal.steps.step import Step


class WeightMean:
    """The exponential mean of weights and running statistics (Polyak and Juditsky 1992).

    After step n (counted from 1) the mean m of a tensor w becomes d m + (1 - d) w with d = min(decay, n / (n + 9)), as
    in TensorFlow's ExponentialMovingAverage: a short run, too, forgets the weights that it began with. Running
    statistics have the same mean, as in torchvision's and timm's training scripts; statistics of the mean weights
    themselves would cost a pass over the training images. Tensors of integers are the network's own. A skipped step
    counts as one that changes nothing.

    Nothing here waits for the device.

    Args:
        model: the network; its tensors keep their shapes.
        decay: 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._steps = 0
        saved = model.state_dict().keys()
        self._own = {
            name: tensor.detach()
            for name, tensor in chain(model.named_parameters(), model.named_buffers())
            if name in saved and tensor.is_floating_point()
        }
        self._mean = {name: tensor.clone() for name, tensor in self._own.items()}

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return sum(tensor.nbytes for tensor in self._mean.values())

    def update(self) -> None:
        """Adds the network as it is after a step."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9))
        get_ema_multi_avg_fn(decay)(list(self._mean.values()), list(self._own.values()), self._steps)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within it the network has the mean's values, and the mean the network's; within two of them, its own."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By value: recorded steps read and write the network's tensors where they are.
        for own, mean in zip(self._own.values(), self._mean.values(), strict=True):
            before = own.clone()
            own.copy_(mean)
            mean.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """The mean, and the number of steps in it."""
        return {"steps": self._steps, "tensors": dict(self._mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            LowcalError: it is of another network.
        """
        tensors: Mapping[str, Tensor] = state["tensors"]
        for name, mean in self._mean.items():
            if name not in tensors or tensors[name].shape != mean.shape:
                raise LowcalError(f"the mean of the weights has no '{name}' of shape {tuple(mean.shape)}")
            mean.copy_(tensors[name])
        self._steps = state["steps"]


class AveragedStep:
    """A step after which the mean of the weights is updated, outside of what may be recorded on the device.

    Args:
        step: trains the network.
        mean: of its weights.
    """

    def __init__(self, step: Step, mean: WeightMean) -> None:
        self._step, self._mean = step, mean

    @property
    def skipped(self) -> Tensor | None:
        """See `Step`."""
        return self._step.skipped

    def __call__(self, *batch: Tensor) -> Tensor:
        """Trains on one mini-batch; see `Step`."""
        loss = self._step(*batch)
        self._mean.update()
        return loss
