import pytest

from lowcal.report.comparison import make_rows
from lowcal.report.headline import common_title, comparison_notes, findings, headline, title
from lowcal.report.runs import read_runs

from .synthetic import write_run


def rows_of(folder):
    return list(make_rows(read_runs([folder])))


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


def test_headline_says_what_came_out(tmp_path):
    write_run(tmp_path, "sgd", 0, error=10.0, seconds=12.3)
    write_run(tmp_path, "freeze", 0, error=10.4, seconds=10.0, boundary=4)
    write_run(tmp_path, "local", 0, error=9.96, seconds=15.0, boundary=4)
    write_run(tmp_path, "prune", 0, error=10.0, seconds=12.3)
    assert headline(rows_of(tmp_path)) == (
        "local trained 1.22× slower than SGD at −0.04 points of top-1 error; freeze 1.23× faster at +0.4 points; "
        "prune took the same time as SGD at +0.00 points. With one seed, small differences may be chance."
    )


def test_findings_are_the_headline_in_sentences(tmp_path):
    write_run(tmp_path, "sgd", 0, error=10.0, seconds=12.3)
    write_run(tmp_path, "freeze", 0, error=10.4, seconds=10.0, boundary=4)
    write_run(tmp_path, "local", 0, error=9.96, seconds=15.0)
    assert findings(rows_of(tmp_path)) == [
        "freeze trained 1.23× faster than SGD at +0.4 points of top-1 error.",
        "The boundary of local never moved, so that it trained as SGD does.",
        "With one seed, small differences may be chance.",
    ]


def test_headline_says_when_the_seeds_spread_hides_a_difference(tmp_path):
    for seed, shift in enumerate((0.0, 1.0)):
        write_run(tmp_path, "sgd", seed, error=10 + shift, seconds=12.0)
        write_run(tmp_path, "freeze", seed, error=10.2 + shift, seconds=10.0, boundary=4)
        write_run(tmp_path, "local", seed, error=15 + shift, seconds=10.0, boundary=4)
    assert headline(rows_of(tmp_path)) == (
        "local trained 1.20× faster than SGD at +5.0 points of top-1 error; "
        "freeze 1.20× faster at +0.2 points (within the seeds' spread)."
    )


def test_headline_without_a_comparison(tmp_path):
    write_run(tmp_path / "a", "freeze", error=10.0, seconds=12.0)
    assert headline(rows_of(tmp_path / "a")) == (
        "freeze reached 10.00 % top-1 error in 12.0 s of training. No sgd run to compare with."
    )
    write_run(tmp_path / "b", "sgd", done=1)
    assert headline(rows_of(tmp_path / "b")).startswith("No run is finished yet")
    assert findings(rows_of(tmp_path / "a")) == [
        "freeze reached 10.00 % top-1 error in 12.0 s of training.", "No sgd run to compare with.",
    ]  # fmt: skip


def test_a_boundary_that_never_moved_is_said_in_the_place_of_a_comparison(tmp_path):
    write_run(tmp_path, "sgd", error=10.0, seconds=12.0)
    write_run(tmp_path, "local", error=10.4, seconds=10.0)
    rows = rows_of(tmp_path)
    assert headline(rows) == "the boundary of local never moved, so that it trained as SGD does."
    assert comparison_notes(read_runs([tmp_path]), rows) == [
        "The boundary of local never moved, so that it trained as SGD does: differences from sgd are chance."
    ]


def test_a_speedup_within_the_spread_of_its_seeds_is_said(tmp_path):
    for seed, (sgd, local, freeze) in enumerate([(12.0, 10.8, 8.0), (10.0, 10.8, 7.0)]):
        write_run(tmp_path, "sgd", seed, seconds=sgd)
        write_run(tmp_path, "local", seed, seconds=local, boundary=4, error=30.0)  # 1.11 and 0.93 times as fast
        write_run(tmp_path, "freeze", seed, seconds=freeze, boundary=4, error=30.0)
    rows = rows_of(tmp_path)
    assert "local trained 1.02× faster than SGD (within the seeds' spread) at +20.0 points" in headline(rows)
    assert "freeze 1.46× faster at +20.0 points" in headline(rows)
    assert "Speed-up within the spread of its seeds: local." in comparison_notes(read_runs([tmp_path]), rows)


def rivals(folder, freeze, rival):
    for seed, (one, other) in enumerate(zip(freeze, rival, strict=True)):
        write_run(folder, "sgd", seed, error=8.0, seconds=20.0)
        write_run(folder, "freeze", seed, error=one, seconds=10.0, boundary=4)
        for epochs, error, seconds in ((1, 30.0, 6.0), (2, other, 11.0)):
            name = f"sgd-compressed-{epochs}-seed{seed}"
            write_run(
                folder, "sgd", seed, error=error, seconds=seconds, epochs=epochs, name=name,
                variant=f"compressed-{epochs}",
            )  # fmt: skip


def test_the_rival_is_sgd_given_at_least_the_same_time(tmp_path):
    """The paired t of the differences -1, -2, -3 is -3.4641 with 2 degrees of freedom: p = 0.0742 by the tables."""
    rivals(tmp_path, [9.0, 9.0, 9.0], [10.0, 11.0, 12.0])
    text = headline(rows_of(tmp_path))
    assert "freeze is 2.0 points better than SGD given the same time (2 epochs, 11.0 s) (3 seeds, p = 0.074)." in text
    assert "sgd-compressed" not in text
    assert not any("different epochs" in note for note in comparison_notes(read_runs([tmp_path]), rows_of(tmp_path)))


def test_without_a_spread_there_is_no_p(tmp_path):
    rivals(tmp_path, [9.0, 9.0], [8.0, 8.0])
    assert "freeze is 1.0 points worse than SGD given the same time (2 epochs, 11.0 s)." in headline(rows_of(tmp_path))
