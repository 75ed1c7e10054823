import pytest

from lowcal.report.headline import common_title, title

ALL = {"train": 50_000, "train_of": 50_000, "test": 10_000, "test_of": 10_000, "classes": 10, "folder": None}


def settings(model="resnet18", data="cifar10", epochs=90, width=None, **more):
    return {"model": {"name": model, "width": width}, "data": {"name": data, **more}, "epochs": epochs}


@pytest.mark.parametrize(
    ("recipe", "images", "text"),
    [
        (settings(), None, "ResNet18 on CIFAR-10, 90 epochs"),
        (settings(), ALL, "ResNet18 on CIFAR-10, 90 epochs"),
        (
            settings(width=8, epochs=2, train_images=300),
            ALL | {"train": 300},
            "ResNet18 of width 8 on CIFAR-10, 2 epochs, 300 of 50,000 images",
        ),
        (settings(epochs=1, train_images=300), None, "ResNet18 on CIFAR-10, 1 epoch, 300 images"),
        (
            settings("vgg13"),
            ALL | {"train": 300, "test": 50},
            "VGG13 on CIFAR-10, 90 epochs, 300 of 50,000 training and 50 of 10,000 test images",
        ),
        (settings(), ALL | {"test": 50}, "ResNet18 on CIFAR-10, 90 epochs, 50 of 10,000 test images"),
        (
            settings(data="image-folder", image_size=64),
            {"train": 400, "train_of": 400, "test": 40, "test_of": 40, "classes": 2, "folder": "pets"},
            "ResNet18 on the image folder 'pets' (2 classes, 64x64), 90 epochs, 400 images",
        ),
        (
            settings("mobilenet_v2", "imagenet", 150),
            {"train": 130, "train_of": 1_281_167, "test": 50, "test_of": 50, "classes": 100, "folder": None},
            "MobileNetV2 on ImageNet (100 classes), 150 epochs, 130 of 1,281,167 images",
        ),
        (
            settings("resnet8", "digits", evaluate="validation"),
            {"train": 1078, "train_of": 1348, "test": 270, "test_of": 449, "classes": 10, "folder": None},
            "ResNet8 on 8x8 digits, 90 epochs, 1,078 of 1,348 images, tested on held-out training images",
        ),
        (settings("swin_t", "synthetic", 3, classes=4), None, "swin_t on synthetic images (4 classes), 3 epochs"),
    ],
)
def test_a_title_says_what_runs(recipe, images, text):
    assert title(recipe, images) == text


def test_runs_side_by_side_are_titled_by_what_they_share():
    runs = [(settings(width=8, epochs=2), ALL), (settings(width=8, epochs=3), ALL | {"train": 300})]
    assert common_title(runs) == "ResNet18 of width 8 on CIFAR-10"


@pytest.mark.parametrize("strange", [{}, {"model": "text", "data": 3}, {"epochs": "many", "model": {"width": "x"}}])
def test_damaged_settings_give_some_title(strange):
    assert isinstance(title(strange), str)
