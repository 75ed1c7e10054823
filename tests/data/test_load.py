import pytest
import torch

from lowcal.data import DATASETS, Batches, load
from lowcal.errors import LowcalError


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
    assert "notes.txt: not an image" in data.skipped[0]
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
