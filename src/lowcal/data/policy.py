"""Random operations on training images, one by one, by torchvision's transforms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Policy:
    """What a worker process does at random to a training image, in this order.

    Attributes:
        crop: whether it is cropped and flipped.
        name: of the operations on its geometry and colours: RandAugment (Cubuk et al. 2020) or TrivialAugment (Mueller
            and Hutter 2021); None: there are none.
        ops: operations of RandAugment.
        magnitude: their strength, 0 to 30.
        erase: the probability that a rectangle is erased (Zhong et al. 2020).
        colour: of the rectangle, 0 to 255 for each channel.
    """

    crop: bool = True
    name: Literal["randaugment", "trivial"] | None = None
    ops: int = 2
    magnitude: int = 9
    erase: float = 0.0
    colour: tuple[int, ...] = (0,)

    @property
    def needs_workers(self) -> bool:
        """Whether there is more than a crop and a flip, which a loader of images in memory makes on the device."""
        return self.name is not None or self.erase > 0

    @property
    def is_random(self) -> bool:
        """Whether it changes images at all."""
        return self.crop or self.needs_workers

    def erasing(self, mean: Sequence[float]) -> Self:
        """The same, with the colour `mean`, 0 to 1 for each channel, where it erases."""
        return replace(self, colour=tuple(round(255 * value) for value in mean))

    def transform(self, crop: Sequence[Any], middle: Sequence[Any]) -> Any:
        """From a PIL image to a uint8 tensor (C, H, W), drawing from torch's global generator.

        Args:
            crop: the transforms that crop and flip.
            middle: those for an image that is not cropped at random.
        """
        from torchvision.transforms import v2  # imported late: it takes a second

        steps = list(crop if self.crop else middle)
        if self.name == "randaugment":
            steps.append(v2.RandAugment(self.ops, self.magnitude))
        elif self.name == "trivial":
            steps.append(v2.TrivialAugmentWide())
        steps.append(v2.PILToTensor())
        if self.erase:
            steps.append(v2.RandomErasing(self.erase, value=list(self.colour)))
        return v2.Compose(steps)
