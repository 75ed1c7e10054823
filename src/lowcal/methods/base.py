"""What the training loop asks of a method, and plain SGD, which every other method is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowcal.cache import Cached, Inputs
from lowcal.discovery import trace
from lowcal.errors import LowcalError
from lowcal.overlap import Overlap
from lowcal.settings import Settings

Fact = float | int | None


class Method:
    """A way to train a network that `lowcal compare` compares; this one adds nothing to SGD.

    The training loop calls `penalty` in every step and `end_epoch` after every epoch. A method that acts inside the
    network registers hooks on it, which tell training from evaluation by ``model.training``. A method that draws
    random numbers has its own generator, whose state is part of `state_dict`.

    Args:
        model: the network, on its device. A method may slice its parameters in place between epochs.
        optimizer: holds the network's parameters.
        settings: of this method: the section of a recipe that `section` names.
        epochs: epochs in the whole training.
        example_inputs: images (N, C, H, W); one is enough.
        seed: of the method's random numbers.

    Attributes:
        layers: names of the network's weight layers in the order of the forward pass.
        period: after so many optimizer steps the kinds of step repeat.
        unreplayable: why a step cannot be recorded on the device and replayed; None if it can.
        reshapes: whether `end_epoch` may change the shapes of the network's tensors.
        caches: whether the layers before the boundary stay the same, so that they can be computed once for each image.
    """

    name: ClassVar[str]
    section: ClassVar[str] = "local"
    period: int = 1
    unreplayable: ClassVar[str | None] = None
    reshapes: ClassVar[bool] = False
    caches: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: Settings,
        *,
        epochs: int,
        example_inputs: Tensor,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.epochs = epochs
        self.seed = seed
        self._learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.layers = self._attach(example_inputs)

    def _attach(self, example_inputs: Tensor) -> tuple[str, ...]:
        """Puts the method's hooks on the network and returns the names of its layers."""
        return trace(self.model, example_inputs).layers

    @property
    def boundary(self) -> int:
        """The number of leading layers that do not learn by SGD."""
        return 0

    def move_to(self, boundary: int) -> None:
        """Sets the boundary by hand; never backwards."""
        if boundary != 0:
            raise LowcalError(f"{self.name} trains every layer, so its boundary cannot be {boundary}; leave it at 0")

    @property
    def middle(self) -> int:
        """A boundary in the middle of those at which layers make local updates in this training; 0: none do."""
        return 0

    def penalty(self, loss: Tensor) -> Tensor | None:
        """A 0-d tensor with graph to add to a mini-batch's mean loss `loss`, or None."""
        return None

    def parallel(self, **ddp_options: Any) -> nn.Module:
        """The module that several processes call instead of the network to average its gradients.

        It is valid until `end_epoch` returns True. Drop every reference to it before the next call. The options are
        those of `torch.nn.parallel.DistributedDataParallel`.
        """
        return DistributedDataParallel(self.model, **ddp_options)

    def cached(self, inputs: Inputs | Callable[[int], Inputs], **options: Any) -> Cached:
        """The network with its frozen layers computed once for each image, if the method `caches`.

        The options are those of `lowcal.Cached`.
        """
        raise NotImplementedError(f"{self.name} has no frozen layers")

    @property
    def phase(self) -> int:
        """The kind of the next step; steps of the same kind give the device the same work."""
        return 0

    def make_replayable(self, device: torch.device) -> None:
        """Keeps numbers that change from epoch to epoch on `device` from now on."""

    def overlapped(self, overlap: Overlap) -> AbstractContextManager[None]:
        """Inside it, products of local updates run by `overlap`, if there are any."""
        return nullcontext()

    def replayed(self) -> None:
        """Does the part of a step that runs in Python alone, after the device has replayed one of this phase."""

    def expected_flops(self, step: Callable[[], Any], count: Callable[[Callable[[], Any]], int]) -> float:
        """The mean FLOPs of a training step; `step` takes one step, `count` counts the FLOPs of a call."""
        return sum(count(step) for _ in range(self.period)) / self.period

    def end_epoch(self, loss: float) -> bool:
        """Ends an epoch of mean training loss `loss`.

        Returns:
            Whether the network, or the set of parameters that learn by SGD, changed, so that the training step must
            be built again.
        """
        return False

    def facts(self) -> dict[str, Fact]:
        """The method's fields in the run's log for the last epoch."""
        return {"local_lr": None, "sign": None, "transition_change": None, "skipped_updates": 0}

    def results(self) -> dict[str, Fact]:
        """The method's fields in the summary of a finished run."""
        return {}

    def twin(self, model: nn.Module, optimizer: Optimizer, example_inputs: Tensor) -> Self:
        """The same method at the same boundary on a copy of the network, for dry runs and warm-up.

        The hooks of this method must do nothing in a copy of the network.
        """
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._learning)
        twin = type(self)(
            model, optimizer, self.settings, epochs=self.epochs, example_inputs=example_inputs, seed=self.seed
        )
        twin.move_to(self.boundary)
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Everything that the method's next step depends on, as tensors and plain values only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the method from `state`.

        Call it before training and before the network's and the optimizer's state are loaded: a method that reshapes
        the network gives it its shape here.

        Raises:
            LowcalError: `state` belongs to another method or network; nothing is changed then.
        """
        if state:
            raise LowcalError(
                f"{self.name} has no state, but the given one has {sorted(state)}; load a state of {self.name}"
            )

    def detach(self) -> None:
        """Removes the method's hooks from the network and the optimizer."""


class SGD(Method):
    """The whole network learns by SGD."""

    name: ClassVar[str] = "sgd"
