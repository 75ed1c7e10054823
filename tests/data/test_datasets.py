"""Datasets by name: settings, subsets, splits, and what each kind of data is."""

import re
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits

from lowcal.data import DATASETS, Batches, Images, datasets, load
from lowcal.data.dataset import split, subset
from lowcal.data.datasets import make_synthetic, read_digits
from lowcal.errors import LowcalError
from lowcal.experiments.assemble import load_data
from lowcal.experiments.recipe_text import apply_settings, load_recipe


def rows(images):
    return {tuple(row) for row in images.pixels.flatten(1).tolist()}


def test_digits_by_default():
    data = load("digits")
    assert data.image_shape == (1, 8, 8)
    assert len(data.classes) == 10
    values = data.train.pixels.double() / 255
    assert data.mean[0] == pytest.approx(values.mean().item())
    assert data.std[0] == pytest.approx(values.std(correction=0).item())


def test_normalised_training_images_have_mean_0_and_deviation_1():
    data = load("synthetic", classes=3, image_size=8, train_images=300, test_images=30)
    ((x, _),) = Batches(data.train, batch=300, mean=data.mean, std=data.std)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_validation_holds_out_training_images_and_hides_the_test_images():
    full = load("digits")
    held = load("digits", evaluate="validation", validation_fraction=0.25)
    assert len(held.test) == 337
    assert len(held.train) + len(held.test) == len(full.train)
    assert rows(held.train) | rows(held.test) == rows(full.train)
    assert not rows(held.test) & rows(full.test)


def test_validation_then_subset():
    data = load("digits", evaluate="validation", train_images=500, test_images=100)
    assert (len(data.train), len(data.test)) == (500, 100)
    assert not rows(data.train) & rows(data.test)


def test_seed_decides_subset_and_split():
    first, second, other = (load("digits", evaluate="validation", train_images=300, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert rows(first.test) != rows(other.test)


def test_synthetic_validation():
    data = load("synthetic", train_images=100, test_images=10, evaluate="validation")
    assert (len(data.train), len(data.test)) == (80, 20)


def test_to_device_keeps_everything_else():
    data = load("digits").to("meta")
    assert data.train.pixels.device.type == "meta"
    assert data.mean == load("digits").mean


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar-10"}, r"unknown data 'cifar-10'; did you mean 'cifar10'\?"),
        ({"name": "zzz"}, f"choose from {', '.join(DATASETS)}"),
        ({"name": "digits", "data_dir": "x"}, "reads no folder"),
        ({"name": "synthetic", "channels": 3}, "has images of 3 channels: leave out data.channels"),
        ({"name": "digits", "classes": 5}, "brings its own classes"),
        ({"name": "digits", "train_images": 1349}, "data.train_images is 1349.*only 1348"),
        ({"name": "digits", "test_images": 3}, "data.test_images is 3, fewer than the 10 classes"),
        ({"name": "digits", "train_images": 0}, "data.train_images is 0"),
        ({"name": "synthetic", "classes": 1}, "data.classes is 1"),
        ({"name": "synthetic", "image_size": 0}, "data.image_size is 0"),
        ({"name": "synthetic", "train_images": 5}, "data.train_images is 5, fewer than the 10 classes"),
        ({"name": "image-folder"}, "needs a folder"),
        ({"name": "imagenet"}, r"needs a folder with train/ and val/: give it with --data-dir"),
        ({"name": "imagenet", "workers": -1}, "data.workers is -1, but must be at least 0"),
        ({"name": "cifar10", "workers": 2}, "needs no workers: leave out data.workers"),
        ({"name": "image-folder", "data_dir": "x"}, "data.image_size"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(LowcalError, match=message) as caught:
        load(**arguments)
    assert "\n" not in str(caught.value)


COUNTS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


@pytest.fixture(scope="module")
def empty_classes(tmp_path_factory):
    """A function that makes train/ and test/ or val/ with so many class folders, which hold nothing."""

    @cache
    def make(count, held_out="test"):
        root = tmp_path_factory.mktemp(f"{count}-{held_out}")
        for part in ("train", held_out):
            for label in range(count):
                (root / part / f"{label:04}").mkdir(parents=True)
        return root

    return make


@pytest.mark.parametrize("kind", ["digits", *COUNTS])
@pytest.mark.parametrize("count", [2, 10, 100])
def test_a_wrong_number_of_classes_is_refused_with_a_remedy_that_works(empty_classes, kind, count):
    recipe = apply_settings(load_recipe("resnet18-cifar10"), [f"data.name={kind}"])
    root = empty_classes(count, "val" if kind == "imagenet" else "test")
    with pytest.raises(LowcalError) as caught:
        load_data(recipe, root)
    text = str(caught.value)
    assert "\n" not in text
    if kind == "digits":
        assert "reads no folder" in text
    elif COUNTS[kind] == count:
        assert "class folders without a file" in text  # the right number, so the reader looks at the files
    else:
        assert f"holds {count} class folders, but data {kind!r} has {COUNTS[kind]}" in text
        remedies = re.findall(r"--set (\S+)", text)
        assert remedies
        remedied = apply_settings(recipe, remedies)
        with pytest.raises(LowcalError, match="class folders without a file"):
            load_data(remedied, root)


def test_a_declared_number_of_classes_is_checked(empty_classes):
    with pytest.raises(LowcalError, match=r"holds 10 class folders, but data\.classes is 2: .* --set data\.classes=10"):
        load("image-folder", data_dir=empty_classes(10), image_size=8, classes=2)


def test_torchvisions_files_of_the_other_cifar_are_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(LowcalError, match=r"holds CIFAR-10, but this recipe's data is 'cifar100'.*data\.name=cifar10$"):
        load("cifar100", data_dir=tmp_path)


def test_what_was_drawn_from_is_known(make_folder):
    data = load("digits", train_images=100, test_images=50, evaluate="validation")
    assert (data.whole, data.folder) == ((1348, 449), None)
    data = load("image-folder", data_dir=make_folder(name="pets"), image_size=16, train_images=4)
    assert (data.whole, data.folder) == ((8, 8), "pets")
    data = load("cifar10", data_dir=make_folder(classes="abcdefghij"))
    assert (data.whole, len(data.train)) == ((50_000, 10_000), 40)  # as published, however many are there


def statistics(pixels):
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64)).statistics()


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
    mean, std = statistics(pixels)
    values = pixels.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_statistics_of_constant_channel_do_not_divide_by_zero():
    assert statistics(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)) == ((1.0,), (1.0,))


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


SYNTHETIC = {"classes": 3, "image_size": 16, "train": 301, "test": 90}


def test_synthetic_shapes_and_classes():
    source = make_synthetic(**SYNTHETIC, seed=0)
    assert source.train.pixels.shape == (301, 3, 16, 16)
    assert source.train.pixels.dtype == torch.uint8
    assert torch.bincount(source.test.labels).tolist() == [30, 30, 30]
    assert len(source.classes) == 3


def test_the_seed_decides_the_synthetic_images():
    first, second, other = (make_synthetic(**SYNTHETIC, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)


def test_synthetic_classes_can_be_told_apart():
    source = make_synthetic(**SYNTHETIC, seed=0)
    train, test = (part.pixels.flatten(1).double() for part in (source.train, source.test))
    means = torch.stack([train[source.train.labels == label].mean(0) for label in range(3)])
    assert torch.equal(torch.cdist(test, means).argmin(1), source.test.labels)


def test_more_images_than_memory_holds_share_their_pixels(monkeypatch):
    monkeypatch.setattr(datasets, "POOL", 25 * 3 * 16 * 16)
    source = make_synthetic(classes=10, image_size=16, train=201_167, test=15, seed=0)
    assert source.test.rows is None
    assert len(source.train) == 201_167
    assert len(source.train.pixels) == 20
    assert source.train.labels.bincount().unique().tolist() == [20116, 20117]
    assert torch.equal(source.train.labels % 10, source.train.rows % 10)
    kept, held = split(source.train, 0.999, seed=0)
    assert kept.labels.bincount().unique().tolist() == [20, 21]
    ((x, y),) = Batches(kept, batch=len(kept), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.equal(x.to(torch.uint8), source.train.pixels[kept.rows])
    assert torch.equal(y, kept.rows % 10)
    assert held.pixels is kept.pixels


def test_there_is_an_image_for_each_class_however_large_they_are(monkeypatch):
    monkeypatch.setattr(datasets, "POOL", 1)
    source = make_synthetic(**SYNTHETIC, seed=0)
    assert len(source.train.pixels) == 3
    assert source.train.rows[:5].tolist() == [0, 1, 2, 0, 1]


def test_digits_may_be_enlarged_and_coloured():
    plain, large = load("digits"), load("digits", image_size=32, channels=3)
    assert large.image_shape == (3, 32, 32)
    assert torch.equal(large.train.labels, plain.train.labels)
    pixels = large.train.pixels
    assert torch.equal(pixels[:, :1].expand(-1, 3, -1, -1), pixels)
    corner = plain.train.pixels[:, 0, :2, :2].double()
    near = torch.tensor([0.125, 0.875], dtype=torch.float64)  # pixel 5 of 32 has its centre at 0.875 of the 8
    expected = torch.einsum("nij,i,j->n", corner, near, near)
    assert (pixels[:, 0, 5, 5] - expected).abs().max() <= 0.5
    assert large.augmentation.pad == 4 * plain.augmentation.pad
    assert load("digits", augment=False).augmentation is None
