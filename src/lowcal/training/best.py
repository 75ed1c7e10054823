"""The weights of a run with the lowest error so far, in `model-best.safetensors`.

They are written when the network has been evaluated, under another name; after the checkpoint of that epoch they get
their name. A resumed run thus has the best weights of the epochs that it has finished, wherever it was interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from lowcal.files import refused
from lowcal.training.checkpoint import write_safetensors
from lowcal.training.run_folder import RunFolder

BEST = "model-best.safetensors"
_NEXT = "model-best.next.safetensors"


class BestWeights:
    """The best weights of the run in `folder`. Without the safetensors library there are none.

    Raises:
        LowcalError: the system refuses a file; the present one is then intact.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def offer(self, model: nn.Module, epoch: int, error: float) -> None:
        """Writes the weights of `model` if the `error` of `epoch` (counted from 0) is below those of all before."""
        errors = [record["top1_error"] for record in self._folder.read_epochs()]
        if all(error < other for other in errors):
            write_safetensors(model, self._folder.path / _NEXT, epoch=str(epoch))

    def settle(self, finished: int) -> None:
        """Keeps the weights of the run's `finished` epochs, and removes those of later ones, which are taken again."""
        for path in (self._folder.path / _NEXT, self._folder.path / BEST):
            try:
                if not path.exists():
                    continue
                if epoch_of(path) < finished:
                    path.replace(self._folder.path / BEST)
                else:
                    path.unlink()
            except OSError as error:
                raise refused(path, error) from error


def epoch_of(path: Path) -> int:
    """The epoch, counted from 0, of the weights in a file that `BestWeights` wrote."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["epoch"])
