"""Images in memory that worker processes augment, for operations that differ from image to image."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.data import Dataset

from lowcal.data.dataset import Augmentation, Files, Images
from lowcal.data.images import Decoded, Decoders, Task, seeded
from lowcal.data.policy import Policy
from lowcal.errors import LowcalError


def in_workers(
    images: Images,
    augmentation: Augmentation | None,
    policy: Policy,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    workers: int | None,
) -> Files:
    """`images` as if they were files, with their positions for paths, that worker processes augment by `policy`.

    Args:
        augmentation: how the images are cropped and flipped, if the policy does.

    Raises:
        LowcalError: the images are neither grey nor in colour.
    """
    if images.shape[0] not in (1, 3):
        raise LowcalError(
            "RandAugment, TrivialAugment and random erasing need images of 1 or 3 channels, these have "
            f"{images.shape[0]}; --set data.augment=true --set data.random_erase=0"
        )
    decoders = Decoders(images.shape, partial(_Augmenting, images, augmentation, policy), workers)
    return Files(range(len(images)), images.labels, decoders, mean, std)


class _Augmenting(Dataset[Decoded]):
    """From a batch of tasks to pixels; runs in a worker."""

    def __init__(self, images: Images, augmentation: Augmentation | None, policy: Policy) -> None:
        from torchvision.transforms import v2

        self.images = images
        crop: list[v2.Transform] = []
        if augmentation is not None:
            crop.append(v2.RandomCrop(images.shape[1:], padding=augmentation.pad))
            crop += [v2.RandomHorizontalFlip()] if augmentation.flip else []
        self.train = policy.transform(crop, [])

    def __getitems__(self, tasks: Sequence[Task]) -> Decoded:
        """What torch's loader calls with a batch."""
        return self[tasks]

    def __getitem__(self, tasks: Sequence[Task]) -> Decoded:
        from torchvision.transforms.v2.functional import to_pil_image

        pixels = self.images.pixels_at(torch.tensor([task.path for task in tasks], dtype=torch.int64))
        for image, task in zip(pixels, tasks, strict=True):
            if task.seed is not None:
                with seeded(task.seed):
                    image.copy_(self.train(to_pil_image(image)))
        return Decoded(pixels, torch.tensor([task.label for task in tasks], dtype=torch.int64), [])
