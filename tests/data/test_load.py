import re
from functools import cache

import pytest
import torch

from lowcal.data import DATASETS, Batches, load
from lowcal.errors import LowcalError
from lowcal.experiments.assemble import load_data
from lowcal.experiments.recipe_text import apply_settings, load_recipe, recipe_names


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


def test_subsets():
    data = load("digits", train_images=200, test_images=50)
    assert (len(data.train), len(data.test)) == (200, 50)
    assert len(data.train.labels.unique()) == 10


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


def test_image_folder_with_skipped_files(make_folder):
    root = make_folder()
    (root / "train/cat/notes.txt").write_text("not an image")
    data = load("image-folder", data_dir=root, image_size=16, on_error="skip")
    assert len(data.skipped) == 1
    assert data.skipped[0].endswith("notes.txt: its ending is not one of images")
    assert data.image_shape == (3, 16, 16)


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
        ({"name": "digits", "image_size": 16}, "no settable image size"),
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
        ({"name": "cifar100", "image_size": 64}, "no settable image size"),
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
        for split in ("train", held_out):
            for label in range(count):
                (root / split / f"{label:04}").mkdir(parents=True)
        return root

    return make


@pytest.mark.parametrize("count", [2, 10, 100, 1000])
@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("data", ["its own", *COUNTS])
def test_a_wrong_number_of_classes_is_refused_by_each_recipe_with_each_data_set(empty_classes, name, data, count):
    recipe = load_recipe(name)
    recipe = recipe if data == "its own" else apply_settings(recipe, [f"data.name={data}"])
    kind = recipe.data.name
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
