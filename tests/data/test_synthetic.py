import torch

from lowcal.data.synthetic import make_synthetic

SETTINGS = {"classes": 3, "image_size": 16, "train": 301, "test": 90}


def test_shapes_and_classes():
    source = make_synthetic(**SETTINGS, seed=0)
    assert source.train.pixels.shape == (301, 3, 16, 16)
    assert source.train.pixels.dtype == torch.uint8
    assert torch.bincount(source.test.labels).tolist() == [30, 30, 30]
    assert len(source.classes) == 3


def test_seed_decides_all():
    first, second, other = (make_synthetic(**SETTINGS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)


def test_classes_can_be_told_apart():
    source = make_synthetic(**SETTINGS, seed=0)
    train, test = (part.pixels.flatten(1).double() for part in (source.train, source.test))
    means = torch.stack([train[source.train.labels == label].mean(0) for label in range(3)])
    assert torch.equal(torch.cdist(test, means).argmin(1), source.test.labels)
