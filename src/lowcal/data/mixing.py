"""Training images in pairs: mixup and CutMix, whose targets are probabilities of the classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcal.data.images import seeded


@dataclass(frozen=True)
class Mixing:
    """How each training image is mixed with another: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

    The other is its neighbour in the epoch's random order. With both, each image gets one of the two at random.

    Attributes:
        classes: how many the data has.
        mixup: alpha of mixup's Beta distribution; 0: no mixup.
        cutmix: likewise of CutMix.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def draw(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """The mixing of each image, (count, 5): its weight in a box, and the box's top, bottom, left and right.

        Mixup has a random weight and the whole image as the box, CutMix weight 0 and a random box. Boxes are those of
        torchvision's `CutMix`.
        """
        _, height, width = shape
        seed = int(torch.randint(2**62, (), generator=generator))
        with seeded(seed):  # distributions draw from the global generator
            is_cut = torch.rand(count) < (0.5 if self.mixup else 1.0) if self.cutmix else torch.zeros(count).bool()
            whole = _beta(self.mixup, count) if self.mixup else torch.ones(count)
            part = _beta(self.cutmix, count) if self.cutmix else torch.ones(count)
            down, right = torch.randint(height, (count,)), torch.randint(width, (count,))
        half = 0.5 * (1 - part).sqrt()
        tall, wide = (half * height).int(), (half * width).int()
        top, bottom = (down - tall).clamp(min=0), (down + tall).clamp(max=height)
        left, right = (right - wide).clamp(min=0), (right + wide).clamp(max=width)
        box = torch.stack((torch.zeros(count), top, bottom, left, right), dim=1)
        everything = torch.tensor([0.0, height, 0.0, width]).expand(count, 4)
        return torch.where(is_cut[:, None], box, torch.cat((whole[:, None], everything), dim=1))

    def mix(self, x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed images, and their targets float32 (n, classes), whose rows sum to 1.

        Args:
            x: images (n, C, H, W).
            y: their class numbers, (n,).
            other_x: the images that they are mixed with.
            other_y: likewise.
            drawn: rows of what `draw` returned, (n, 5), on the device.
        """
        height, width = x.shape[2:]
        weight, top, bottom, left, right = drawn.unsqueeze(2).unbind(1)  # (n, 1) each
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        tall, wide = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        in_box = tall[:, None, :, None] & wide[:, None, None, :]
        own = torch.where(in_box, weight[:, :, None, None], 1.0)
        share = 1 - (1 - weight) * (bottom - top) * (right - left) / (height * width)
        classes = torch.arange(self.classes, device=x.device)
        targets = share * (y[:, None] == classes) + (1 - share) * (other_y[:, None] == classes)
        return torch.lerp(other_x, x, own), targets


def partners(index: Tensor, count: int) -> Tensor:
    """The positions of the neighbours: 1 of 0, 0 of 1, 3 of 2; the last of an odd `count` has none but itself."""
    other = index ^ 1
    return torch.where(other < count, other, index)


def _beta(alpha: float, count: int) -> Tensor:
    return torch.distributions.Beta(alpha, alpha).sample((count,))
