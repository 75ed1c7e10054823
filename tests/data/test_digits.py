import torch
from sklearn.datasets import load_digits

from lowcal.data.digits import read_digits


def test_every_digit_is_in_one_of_the_two_parts():
    source = read_digits()
    assert (len(source.train), len(source.test)) == (1348, 449)
    assert source.train.pixels.shape[1:] == (1, 8, 8)
    assert source.train.pixels.dtype == torch.uint8
    assert source.classes == tuple("0123456789")
    assert not source.augmentation.flip
    bundled = load_digits()
    expected = {(label, *(image * 255 / 16).round().astype(int).ravel()) for image, label in zip(
        bundled.images, bundled.target, strict=True
    )}  # fmt: skip
    found = set()
    for part in (source.train, source.test):
        rows = part.pixels.flatten(1).tolist()
        found |= {(label, *row) for label, row in zip(part.labels.tolist(), rows, strict=True)}
    assert found == expected


def test_the_test_images_are_always_the_same():
    torch.manual_seed(1)
    first = read_digits().test
    torch.manual_seed(2)
    assert torch.equal(first.pixels, read_digits().test.pixels)


def test_each_class_has_its_share():
    source = read_digits()
    share = torch.bincount(source.test.labels) / (
        torch.bincount(source.test.labels) + torch.bincount(source.train.labels)
    )
    assert ((share - 0.25).abs() < 0.01).all()
