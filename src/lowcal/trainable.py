"""Which parameters the optimizer may train: those that the user wants and the boundary allows."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError


class TrainableParameters:
    """Sets ``requires_grad`` of local layers' parameters, and remembers what the user set.

    What the user wants is read when this object is made. For parameters that are not local it is read again after each
    optimizer step. A loop may switch ``requires_grad`` off for a short time (a GAN's discriminator during the
    generator's turn), and a move at that time must not make it permanent. If other code switches local parameters on,
    they are switched off before the next pass. A gradient that still reaches them is dropped before the optimizer's
    step.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wanted: dict[nn.Parameter, bool] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._local: dict[nn.Parameter, bool] = {}  # whether the user wants it to learn
        self.add_new(model)
        self._is_open = False
        self._versions: list[int] = []

    def add_new(self, model: nn.Module) -> None:
        """Adds parameters that `model` has got since."""
        for name, parameter in model.named_parameters():
            self._wanted.setdefault(parameter, parameter.requires_grad)
            self._names[parameter] = name

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether the user wants `parameter` to learn."""
        return self._wanted.get(parameter, parameter.requires_grad)

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes `parameters` local; call `switch` next to set ``requires_grad``."""
        self._local |= {parameter: self.wants(parameter) for parameter in parameters}

    @property
    def local(self) -> list[nn.Parameter]:
        """The local parameters that the user wants to learn."""
        return [parameter for parameter, wanted in self._local.items() if wanted]

    def switch(self, is_open: bool) -> None:
        """Sets whether local parameters take part in back-propagation from now on."""
        self._is_open = is_open
        for parameter, wanted in self._local.items():
            parameter.requires_grad_(wanted and is_open)
            if not is_open:
                parameter.grad = None  # a stale gradient would count in clipping, and be applied

    def close_again(self) -> None:
        """Before a pass: switches off what other code has switched on."""
        if not self._is_open:
            for parameter in self._local:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)

    def begin_step(self) -> None:
        """Before an optimizer's step, which must not move closed parameters."""
        if not self._is_open:
            for parameter in self._local:
                if parameter.grad is not None:
                    parameter.grad = None
            self._versions = [parameter._version for parameter in self._local]

    def end_step(self, optimizer: Optimizer) -> None:
        """After an optimizer's step: checks that it left closed parameters alone.

        Raises:
            LowcalError: it has written to one.
        """
        if self._is_open:
            return
        for parameter, version in zip(self._local, self._versions, strict=False):
            if parameter._version != version:
                raise LowcalError(
                    f"{type(optimizer).__name__} changed '{self._names.get(parameter, '?')}', which is local and has "
                    "no gradient: it takes a missing gradient for zeros, so that decay and momentum act on local "
                    "layers; let its step pass over parameters whose grad is None"
                )

    def read_wishes(self) -> None:
        """After a training step: reads what the user wants for parameters that are not local."""
        for parameter in self._wanted:
            if parameter not in self._local:
                self._wanted[parameter] = parameter.requires_grad

    def release(self) -> None:
        """Gives local parameters the ``requires_grad`` that the user wants."""
        for parameter, wanted in self._local.items():
            parameter.requires_grad_(wanted)
        self._local.clear()
