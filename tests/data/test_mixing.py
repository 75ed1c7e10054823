"""Mixup and CutMix against their definitions, and as torchvision draws the boxes."""

import pytest
import torch
from torchvision.transforms import v2

from lowcal.data import Batches, Images
from lowcal.data.mixing import Mixing, partners

COUNT, SIZE = 21, 12


@pytest.fixture
def images():
    """No two pixels at one place are alike, and each image has its own class."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.stack([torch.randperm(256, generator=generator)[:COUNT] for _ in range(3 * SIZE * SIZE)], dim=1)
    return Images(levels.view(COUNT, 3, SIZE, SIZE).to(torch.uint8), torch.arange(COUNT))


def make(images, mixing, **settings):
    settings = {"batch": 5, "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "shuffle": True, **settings}
    return Batches(images, mixing=mixing, **settings)


def mixed(images, mixing):
    """Each mixed image of an epoch, with its targets, and the images that it is made of with their parts."""
    for x, targets in make(images, mixing):
        assert targets.shape == (len(x), COUNT)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(x)))
        for image, row in zip(x, targets, strict=True):
            yield image, [(images.pixels[label].float(), float(row[label])) for label in row.nonzero()[:, 0].tolist()]


def test_neighbours_are_mixed_and_the_last_of_an_odd_number_is_left_alone():
    assert partners(torch.arange(5), 5).tolist() == [1, 0, 3, 2, 4]
    assert partners(torch.tensor([3, 4]), 6).tolist() == [2, 5]


def test_mixup_is_the_weighted_sum_of_two_images_and_of_their_labels(images):
    alone = 0
    for image, made_of in mixed(images, Mixing(COUNT, mixup=0.7)):
        torch.testing.assert_close(image, sum(part * pixels for pixels, part in made_of), atol=1e-3, rtol=1e-4)
        alone += len(made_of) == 1
    assert alone == 1


def test_cutmix_has_a_rectangle_of_another_image_whose_part_is_that_of_its_pixels(images):
    parts = []
    for image, made_of in mixed(images, Mixing(COUNT, cutmix=1.0)):
        if len(made_of) == 1:
            continue
        one, other = (pixels for pixels, _ in made_of)
        is_one, is_other = (image == one).all(0), (image == other).all(0)
        assert torch.equal(is_one, ~is_other)
        assert made_of[0][1] == pytest.approx(float(is_one.float().mean()), abs=1e-6)
        is_box = any(torch.equal(part, part.any(1)[:, None] & part.any(0)) for part in (is_one, is_other))
        assert is_box
        parts.append(made_of[0][1])
    assert len(set(parts)) > 3


def test_mixup_draws_from_the_beta_distribution():
    drawn = Mixing(2, mixup=0.3).draw(20_000, (3, 8, 8), torch.Generator().manual_seed(0))
    assert drawn[:, 1:].unique(dim=0).tolist() == [[0, 8, 0, 8]]
    assert float(drawn[:, 0].mean()) == pytest.approx(0.5, abs=0.01)
    assert float(drawn[:, 0].var()) == pytest.approx(1 / (4 * (2 * 0.3 + 1)), abs=0.005)


def test_boxes_are_distributed_as_torchvision_s():
    height, width, count = 10, 16, 3000
    drawn = Mixing(2, cutmix=1.0).draw(count, (3, height, width), torch.Generator().manual_seed(0))
    cut = v2.CutMix(alpha=1.0, num_classes=2)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        boxes = [cut.make_params([torch.zeros(1, 3, height, width)])["box"] for _ in range(count)]
    theirs = torch.tensor([[top, bottom, left, right] for left, top, right, bottom in boxes]).float()
    assert (drawn[:, 0] == 0).all()
    torch.testing.assert_close(drawn[:, 1:].mean(0), theirs.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(drawn[:, 1:].std(0), theirs.std(0), atol=0.25, rtol=0)


def test_with_both_each_image_gets_one_of_them():
    drawn = Mixing(2, mixup=1.0, cutmix=1.0).draw(2000, (3, 8, 8), torch.Generator().manual_seed(0))
    assert float((drawn[:, 0] == 0).float().mean()) == pytest.approx(0.5, abs=0.04)


def test_channels_last_is_only_a_layout(images):
    plain, last = (list(make(images, Mixing(COUNT, 1.0, 1.0), channels_last=flag)) for flag in (False, True))
    for (x, targets), (other_x, other_targets) in zip(plain, last, strict=True):
        assert other_x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, other_x)
        assert torch.equal(targets, other_targets)
