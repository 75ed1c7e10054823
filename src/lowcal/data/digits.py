"""scikit-learn's bundled handwritten digits: 1,797 real grey images of 8x8, no download."""

import torch

from lowcal.data.dataset import Augmentation, Images, Source, split
from lowcal.errors import LowcalError

__all__ = ["read_digits"]

TEST_FRACTION = 0.25
SPLIT_SEED = 0  # the test images are the same in every run, whatever its seed


def read_digits() -> Source:
    """Read the digits, (N, 1, 8, 8): 1,348 to train on and 449 to test on, since the set comes unsplit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise LowcalError("data 'digits' needs scikit-learn: pip install 'lowcal[cli]'") from error
    bundled = load_digits()
    pixels = torch.from_numpy(bundled.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # 0 to 16
    images = Images(pixels, torch.from_numpy(bundled.target).long())
    train, test = split(images, TEST_FRACTION, SPLIT_SEED)
    return Source(tuple("0123456789"), train, test, Augmentation(pad=1, flip=False))
