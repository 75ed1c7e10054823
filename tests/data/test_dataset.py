import pytest
import torch

from lowcal.data.dataset import Images, channel_statistics, split, subset
from lowcal.errors import LowcalError


def images_with(*sizes):
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)  # each image carries its position
    return Images(pixels, labels)


def positions(images):
    return images.pixels.flatten().tolist()


def test_statistics_equal_those_of_float64():
    pixels = torch.randint(0, 200, (1500, 3, 5, 7), dtype=torch.uint8)
    pixels[:, 1] //= 3
    mean, std = channel_statistics(pixels)
    values = pixels.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_statistics_of_constant_channel_do_not_divide_by_zero():
    assert channel_statistics(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)) == ((1.0,), (1.0,))


def test_subset_keeps_shares_and_order():
    images = images_with(100, 50, 50)
    drawn = subset(images, 40, seed=1, what="n")
    assert torch.bincount(drawn.labels).tolist() == [20, 10, 10]
    assert positions(drawn) == sorted(set(positions(drawn)))
    assert torch.equal(images.labels[positions(drawn)], drawn.labels)


@pytest.mark.parametrize("count", range(3, 16))
def test_subset_has_every_class_and_the_exact_count(count):
    drawn = subset(images_with(12, 2, 2), count, seed=0, what="n")
    counts = torch.bincount(drawn.labels, minlength=3)
    assert len(drawn) == count
    assert (counts >= 1).all()
    assert (counts <= torch.tensor([12, 2, 2])).all()


def test_subset_is_decided_by_the_seed():
    images = images_with(60, 60)
    draws = [positions(subset(images, 30, seed=seed, what="n")) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_subset_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    subset(images_with(60, 60), 30, seed=0, what="n")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("count", "message"), [(31, "only 30 images"), (2, "fewer than the 3 classes")])
def test_subset_mistakes(count, message):
    with pytest.raises(LowcalError, match=f"data.train_images is {count}.*{message}"):
        subset(images_with(10, 10, 10), count, seed=0, what="data.train_images")


def test_split_is_a_stratified_partition():
    images = images_with(100, 50)
    rest, held = split(images, 0.2, seed=0)
    assert torch.bincount(held.labels).tolist() == [20, 10]
    assert sorted(positions(rest) + positions(held)) == list(range(150))


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_split_that_leaves_too_little(fraction):
    with pytest.raises(LowcalError, match=f"validation_fraction is {fraction}"):
        split(images_with(10, 10), fraction, seed=0)
