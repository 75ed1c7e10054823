"""Mini-batches made on the training device from images that live there: order, crop, flip, normalisation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowcal.data.dataset import Augmentation, Images
from lowcal.data.loader import Normalise, Share, check_batch, check_state
from lowcal.errors import LowcalError

__all__ = ["Batches"]


class Batches:
    """A `Loader` of images in memory: x float32 (n, C, H, W) normalised by `mean` and `std`, y int64 (n,), on `device`.

    Each pass is one epoch over all images; the last batch may be smaller. With `shuffle` each epoch has a new
    order, with `augmentation` each image a new crop and flip; both come from generators of their own that start
    from `seed`, so nothing else moves them and they move nothing else. `state_dict` continues exactly, in the
    middle of an epoch too, and whatever the `share`: what is drawn is drawn for the whole batch. No step waits for the
    device.

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
        share: Share = Share(),  # noqa: B008  (immutable)
    ) -> None:
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.batch = batch
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.total = 0
        self._share = share
        self._normalise = Normalise(mean, std, device=self.device, channels_last=channels_last)
        self._order = torch.Generator().manual_seed(seed)
        self._draws = torch.Generator(device=self.device).manual_seed(seed)
        self._epoch_start = self._order.get_state()
        self._position = 0  # images given out in the present epoch
        self._resume_at = 0

    @property
    def batch(self) -> int:
        """Images per batch; may be set at any time and holds from the next batch on."""
        return self._batch

    @batch.setter
    def batch(self, value: int) -> None:
        check_batch(value, len(self.images))
        self._batch = value

    def __len__(self) -> int:
        return -(-len(self.images) // self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start an epoch, or go on with the one that `load_state_dict` brought."""
        self._position, self._resume_at = self._resume_at, 0
        self._epoch_start = self._order.get_state()
        count = len(self.images)
        order = torch.randperm(count, generator=self._order) if self.shuffle else torch.arange(count)
        order = order.to(self.device)
        while self._position < count:
            index = order[self._position : self._position + self._batch]
            self.total = len(index)
            self._position += self.total
            own = self._share.of(self.total)
            yield self._make(index, own, self.augmentation), self.images.labels[index[own]]
        self._position = 0

    def example(self, count: int) -> Tensor:
        """Return the first `count` images as a batch without augmentation; moves no random state."""
        index = torch.arange(min(count, len(self.images)), device=self.device)
        return self._make(index, slice(None), None)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next batch depends on: tensors and plain values."""
        return {
            "images": len(self.images),
            "batch": self._batch,
            "position": self._position,
            "order": self._epoch_start if self._position else self._order.get_state(),
            "draws": self._draws.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken: the next pass gives what was left of that epoch.

        Raises LowcalError, and changes nothing, if the state is of other data or of another kind of device.
        """
        check_state(state, {"images", "batch", "position", "order", "draws"}, len(self.images))
        if state["draws"].shape != self._draws.get_state().shape:
            raise LowcalError(
                f"state of the batches is of another device than {self.device.type}: resume on the same kind"
            )
        self.batch = state["batch"]
        self._order.set_state(state["order"].cpu())
        self._draws.set_state(state["draws"].cpu())
        self._position = self._resume_at = state["position"]
        self._epoch_start = self._order.get_state()

    def _make(self, index: Tensor, own: slice, augmentation: Augmentation | None) -> Tensor:
        pixels = self.images.pixels_at(index[own])
        if augmentation is not None:
            pixels = self._crop_and_flip(pixels, len(index), own, augmentation)
        return self._normalise(pixels)

    def _crop_and_flip(self, pixels: Tensor, total: int, own: slice, augmentation: Augmentation) -> Tensor:
        """Shift each image by up to `pad` pixels each way over black, and mirror about half of them.

        The images are those at the places `own` among the `total` of the batch, for all of which it is drawn.
        """
        count, _, height, width = pixels.shape
        reach = augmentation.pad
        offsets = torch.randint(2 * reach + 1, (2, total), generator=self._draws, device=self.device)[:, own]
        windows = pad(pixels, (reach,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        pixels = windows[torch.arange(count, device=self.device), :, offsets[0], offsets[1]]
        if not augmentation.flip:
            return pixels
        mirror = torch.randint(2, (total, 1, 1, 1), generator=self._draws, device=self.device)[own].bool()
        return torch.where(mirror, pixels.flip(3), pixels)
