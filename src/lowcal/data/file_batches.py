"""Mini-batches of image files, decoded ahead of their use: order, random crop, flip, normalisation."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lowcal.data.dataset import Files
from lowcal.data.decoders import Task
from lowcal.data.listing import unreadable
from lowcal.data.loader import Normalise, Passes, Shard, check_state

__all__ = ["FileBatches"]


class FileBatches(Passes):
    """A `Loader` of files: x float32 (n, 3, H, W) normalised by `mean` and `std`, y int64 (n,), on `device`.

    With `shuffle` each pass has a new order, with `augment` each image a new random-resized crop and flip. The order
    comes from (`seed`, epoch) and each crop from (`seed`, epoch, position), so neither depends on the number of
    workers nor on the `shard`, and `state_dict` continues exactly, in the middle of a pass too. What crosses to the
    device is uint8.

    A file that cannot be read stops the pass with a LowcalError that names it.
    """

    def __init__(
        self,
        files: Files,
        *,
        batch: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        channels_last: bool = False,
        shard: Shard = Shard(),  # noqa: B008  (immutable)
    ) -> None:
        super().__init__(files, batch)
        self.files = files
        self.device = torch.device(device)
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.global_batch = 0
        self._shard = shard
        self._normalise = Normalise(mean, std, device=self.device, channels_last=channels_last)
        self._begun = 0  # passes
        self._position = 0  # images given out in the present pass
        self._resume_at = 0

    def raw_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same pass, as what `collate` makes batches from: pixels uint8 (n, 3, H, W), labels int64 (n,)."""
        if self._resume_at == 0:
            self._begun += 1
        self._position, self._resume_at = self._resume_at, 0
        pin, batch, count = self.device.type == "cuda", self._batch, len(self.files)
        for decoded in self.files.decoders.run(self._tasks(self._begun - 1, self._position, batch), pin=pin):
            if decoded.failures:
                path, reason = decoded.failures[0]
                raise unreadable(f"{path}: {reason}")
            self.global_batch = min(batch, count - self._position)
            self._position += self.global_batch
            yield self._move(decoded.pixels), self._move(decoded.labels)
        self._position = 0

    def collate(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the images' `pixels`: these normalised, and its labels."""
        return self._normalise(pixels), labels

    def sample_input(self, count: int) -> Tensor:
        """Return the first `count` images as evaluation sees them; moves no random state."""
        labels = self.files.labels[:count].tolist()
        tasks = [Task(path, label, None) for path, label in zip(self.files.paths, labels, strict=False)]
        decoded = self.files.decoders.decode(tasks)
        if decoded.failures:
            path, reason = decoded.failures[0]
            raise unreadable(f"{path}: {reason}")
        return self._normalise(self._move(decoded.pixels))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next batch depends on: plain values."""
        return {
            "images": len(self.files),
            "batch": self._batch,
            "seed": self.seed,
            "epoch": self._begun - 1 if self._position else self._begun,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken: the next pass gives what was left of that epoch.

        Raises LowcalError, and changes nothing, if the state is of other data.
        """
        check_state(state, {"images", "batch", "seed", "epoch", "position"}, len(self.files))
        self.batch = state["batch"]
        self.seed = state["seed"]
        self._position = self._resume_at = state["position"]
        self._begun = state["epoch"] + (1 if self._position else 0)

    def _tasks(self, epoch: int, start: int, batch: int) -> Iterator[list[Task]]:
        count, seed = len(self.files), self.seed
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for first in range(start, count, batch):
            index = order[first : first + batch]
            index = index[self._shard.of(len(index))]
            labels = self.files.labels[index].tolist()
            yield [
                Task(self.files.paths[i], label, _mixed(seed, epoch, i) if self.augment else None)
                for i, label in zip(index.tolist(), labels, strict=True)
            ]

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _mixed(*values: int) -> int:
    """A seed of 64 bits that differs for other values."""
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest())
