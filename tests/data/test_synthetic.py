import torch

from lowcal.data import Batches, synthetic
from lowcal.data.dataset import split
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


def test_more_images_than_memory_holds_share_their_pixels(monkeypatch):
    monkeypatch.setattr(synthetic, "POOL", 25 * 3 * 16 * 16)
    source = make_synthetic(classes=10, image_size=16, train=1_281_167, test=15, seed=0)
    assert source.test.rows is None
    assert len(source.train) == 1_281_167
    assert len(source.train.pixels) == 20
    assert source.train.labels.bincount().unique().tolist() == [128116, 128117]
    assert torch.equal(source.train.labels % 10, source.train.rows % 10)
    kept, held = split(source.train, 0.999, seed=0)
    assert kept.labels.bincount().unique().tolist() == [128, 129]
    ((x, y),) = Batches(kept, batch=len(kept), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.equal(x.to(torch.uint8), source.train.pixels[kept.rows])
    assert torch.equal(y, kept.rows % 10)
    assert held.pixels is kept.pixels


def test_there_is_an_image_for_each_class_however_large_they_are(monkeypatch):
    monkeypatch.setattr(synthetic, "POOL", 1)
    source = make_synthetic(**SETTINGS, seed=0)
    assert len(source.train.pixels) == 3
    assert source.train.rows[:5].tolist() == [0, 1, 2, 0, 1]
