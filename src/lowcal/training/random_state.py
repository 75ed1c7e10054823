"""The states of torch's global random generators for one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowcal.errors import LowcalError


class RandomState:
    """Lets each of several interleaved runs draw from torch's global generators as if it were alone.

    Args:
        seed: of both generators, the CPU's and the device's.
        device: the device of the run's network.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if device.type == "cuda":
            self._states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
        self._is_entered = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within it torch's global generators have the run's states; after it they are as they were before."""
        before = self._read()
        self._write(self._states)
        self._is_entered = True
        try:
            yield
        finally:
            self._is_entered = False
            self._states = self._read()
            self._write(before)

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states, one-dimensional uint8 tensors on the CPU."""
        return self._read() if self._is_entered else dict(self._states)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            LowcalError: a generator's state is missing or damaged, as when the run was on another kind of device.
        """
        for name in self._states:
            value = state.get(name)
            try:
                generator = torch.Generator(self._device if name == "cuda" else "cpu")
                generator.set_state(value)  # type: ignore[arg-type]
            except (TypeError, RuntimeError) as error:
                raise LowcalError(
                    f"the state of the random generator '{name}' is missing or damaged; resume on the kind of device "
                    "that the run was started on"
                ) from error
        self._states = {name: state[name] for name in self._states}

    def _read(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def _write(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self._device)
