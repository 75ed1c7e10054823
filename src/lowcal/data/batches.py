"""Mini-batches made on the training device from images that live there: order, crop, flip, normalisation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowcal.data.dataset import Augmentation, Images
from lowcal.data.loader import Normalise, Passes, Shard, check_state

__all__ = ["Batches"]


class Batches(Passes):
    """A `Loader` of images in memory: x float32 (n, C, H, W) normalised by `mean` and `std`, y int64 (n,), on `device`.

    Each pass is one epoch over all images; the last batch may be smaller. With `shuffle` each epoch has a new
    order, with `augmentation` each image a new crop and flip. All of an epoch is drawn when it begins, by a generator
    of its own that starts from `seed`: nothing else moves it, it moves nothing else, and what an image gets depends on
    neither `batch` nor `shard` nor `device`. `state_dict` continues exactly, in the middle of an epoch too. No step
    waits for the device.

    >>> images = Images(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
    >>> [len(y) for x, y in Batches(images, batch=4, mean=(0.5,), std=(0.5,))]
    [4, 4, 2]
    """

    def __init__(
        self,
        images: Images,
        *,
        batch: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        channels_last: bool = False,
        shard: Shard = Shard(),  # noqa: B008  (immutable)
    ) -> None:
        self.device = torch.device(device)
        self.images = images.to(self.device)
        super().__init__(self.images, batch)
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.global_batch = 0
        self._shard = shard
        self._normalise = Normalise(mean, std, device=self.device, channels_last=channels_last)
        self._random = torch.Generator().manual_seed(seed)
        self._epoch_start = self._random.get_state()
        self._position = 0  # images given out in the present epoch
        self._resume_at = 0

    def raw_batches(self) -> Iterator[tuple[Tensor]]:
        """The same pass, as what `collate` makes batches from: (n, 1) int64, or with augmentation (n, 4).

        The columns are an image's number, its offsets down and to the right, and whether it is mirrored.
        """
        self._position, self._resume_at = self._resume_at, 0
        self._epoch_start = self._random.get_state()
        plan = self._draw().to(self.device)
        while self._position < len(plan):
            batch = plan[self._position : self._position + self._batch]
            self.global_batch = len(batch)
            self._position += self.global_batch
            yield (batch[self._shard.of(self.global_batch)],)
        self._position = 0

    def collate(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of what was `drawn`."""
        index = drawn[:, 0]
        pixels = self.images.pixels_at(index)
        if self.augmentation is not None:
            pixels = _crop_and_flip(pixels, drawn[:, 1:], self.augmentation)
        return self._normalise(pixels), self.images.labels[index]

    def sample_input(self, count: int) -> Tensor:
        """Return the first `count` images as a batch without augmentation; moves no random state."""
        index = torch.arange(min(count, len(self.images)), device=self.device)
        return self._normalise(self.images.pixels_at(index))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next batch depends on: tensors and plain values."""
        return {
            "images": len(self.images),
            "batch": self._batch,
            "position": self._position,
            "random": self._epoch_start if self._position else self._random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken: the next pass gives what was left of that epoch.

        Raises LowcalError, and changes nothing, if the state is of other data.
        """
        check_state(state, {"images", "batch", "position", "random"}, len(self.images))
        self.batch = state["batch"]
        self._random.set_state(state["random"].cpu())
        self._position = self._resume_at = state["position"]
        self._epoch_start = self._random.get_state()

    def _draw(self) -> Tensor:
        count, random = len(self.images), self._random
        columns = [torch.randperm(count, generator=random) if self.shuffle else torch.arange(count)]
        if self.augmentation is not None:
            reach = 2 * self.augmentation.pad + 1
            bounds = reach, reach, 1 + self.augmentation.flip
            columns += [torch.randint(bound, (count,), generator=random) for bound in bounds]
        return torch.stack(columns, dim=1)


def _crop_and_flip(pixels: Tensor, drawn: Tensor, augmentation: Augmentation) -> Tensor:
    """Shift each image by up to `pad` pixels each way over black, and mirror about half of them, as `drawn`."""
    count, _, height, width = pixels.shape
    down, right, mirror = drawn.unbind(1)
    sources = pad(pixels, (augmentation.pad,) * 4)
    sources = torch.stack((sources, sources.flip(3))) if augmentation.flip else sources[None]
    windows = sources.unfold(3, height, 1).unfold(4, width, 1)
    return windows[mirror, torch.arange(count, device=pixels.device), :, down, right]
