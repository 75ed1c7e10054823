import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lowcal.data import decode
from lowcal.data.folder import read_image_folder
from lowcal.errors import LowcalError


def read(root, size=16, on_error="stop"):
    return read_image_folder(root, size, on_error)


def message(root, **settings):
    with pytest.raises(LowcalError) as caught:
        read(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_labels(make_folder):
    source = read(make_folder(size=(16, 16)))
    assert source.classes == ("cat", "dog")
    assert source.train.pixels.shape == (8, 3, 16, 16)
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4
    assert source.augmentation.pad == 2
    assert source.skipped == ()


def test_pixels_are_those_of_the_files(make_folder):
    root = make_folder(size=(16, 16))
    source = read(root)
    expected = np.asarray(Image.open(root / "test/dog/2.png")).transpose(2, 0, 1)
    assert torch.equal(source.test.pixels[6], torch.from_numpy(expected.copy()))


def test_shorter_side_is_scaled_and_the_middle_kept(make_folder):
    root = make_folder(size=(60, 20))
    strips = Image.new("RGB", (60, 20), "red")
    strips.paste("blue", (20, 0, 40, 20))
    strips.save(root / "train/cat/0.png")
    pixels = read(root, size=10).train.pixels[0]
    inner = pixels[:, :, 1:-1]  # the antialiasing filter reaches over the cut by one pixel
    assert inner[2].eq(255).all()
    assert inner[0].eq(0).all()


def test_val_stands_in_for_test(make_folder):
    assert len(read(make_folder(splits=("train", "val"))).test) == 8


def test_nested_folders_are_read_and_hidden_files_are_not(make_folder):
    root = make_folder()
    (root / "train/cat/more").mkdir()
    shutil.copy(root / "train/cat/0.png", root / "train/cat/more/9.png")
    (root / "train/cat/.DS_Store").write_bytes(b"x")
    (root / "train/.cache").mkdir()
    assert read(root).train.labels.tolist() == [0] * 5 + [1] * 4


def test_missing_folder(tmp_path):
    assert "no data folder" in message(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    assert "it holds nothing" in message(tmp_path)


def test_folder_without_splits_says_what_it_holds(make_folder):
    assert "must hold train/ and test/ (or val/); it holds cat, dog" in message(make_folder() / "train")


def test_one_class(make_folder):
    assert "two or more classes; found only 'cat'" in message(make_folder(classes=("cat",)))


def test_no_class(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert "two or more classes; found none" in message(tmp_path)


def test_empty_class(make_folder):
    root = make_folder()
    (root / "train/owl").mkdir()
    (root / "test/owl").mkdir()
    assert "without a file" in message(root)
    assert "owl" in message(root)


def test_differing_classes_are_named(make_folder):
    root = make_folder(classes=("cat", "dog", "owl"))
    (root / "test/owl").rename(root / "test/eel")
    assert "only in train/: owl; only in test/: eel" in message(root)


def test_many_differing_classes_are_counted(make_folder):
    root = make_folder(classes=tuple("abcdefgh"), count=1)
    for name in "abcdef":
        shutil.rmtree(root / "test" / name)
    assert "only in train/: a, b, c, d, e and 1 more;" in message(root)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder(make_folder):
    root = make_folder()
    (root / "train/cat").chmod(0)
    assert "cannot read" in message(root)


@pytest.fixture
def damaged(make_folder):
    root = make_folder()
    (root / "train/cat/1.png").write_bytes(b"")
    whole = (root / "test/dog/0.png").read_bytes()
    (root / "test/dog/0.png").write_bytes(whole[:100])
    return root


def test_stop_names_the_first_file_and_the_way_on(damaged):
    text = message(damaged)
    assert "train/cat/1.png: the file is empty" in text
    assert "data.on_error=skip" in text


def test_skip_counts_and_names(damaged):
    source = read(damaged, on_error="skip")
    assert [name.partition(": ")[0] for name in source.skipped] == [
        str(damaged / "train/cat/1.png"), str(damaged / "test/dog/0.png"),
    ]  # fmt: skip
    assert source.train.labels.tolist() == [0] * 3 + [1] * 4
    assert source.test.labels.tolist() == [0] * 4 + [1] * 3
    assert len(source.train.pixels) == len(source.test.pixels) == 7


def test_stop_after_skip_still_stops_though_cached(damaged):
    read(damaged, on_error="skip")
    assert "train/cat/1.png: the file is empty" in message(damaged)
    assert len(read(damaged, on_error="skip").skipped) == 2


def test_broken_link_is_named(make_folder):
    root = make_folder()
    (root / "train/cat/9.png").symlink_to(root / "gone.png")
    assert "train/cat/9.png: No such file" in message(root)


def test_class_whose_files_are_all_skipped(make_folder):
    root = make_folder()
    for path in (root / "train/dog").iterdir():
        path.write_text("no image")
    assert "without one readable image: dog" in message(root, on_error="skip")


@pytest.fixture
def decoded(monkeypatch):
    """Count the files that are decoded."""
    files = []
    original = decode.read_rgb
    monkeypatch.setattr(decode, "read_rgb", lambda path: files.append(path) or original(path))
    return files


def test_second_reading_decodes_nothing(make_folder, decoded):
    root = make_folder()
    first = read(root)
    assert len(decoded) == 16
    second = read(root)
    assert len(decoded) == 16
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.labels, second.test.labels)


def test_changed_file_is_decoded_again(make_folder, decoded):
    root = make_folder()
    read(root)
    Image.new("RGB", (32, 32), "red").save(root / "train/cat/0.png")
    assert read(root).train.pixels[0, 0].eq(255).all()
    assert len(decoded) == 16 + 8


def test_other_size_is_decoded_again(make_folder):
    root = make_folder()
    assert read(root, size=16).train.pixels.shape[-1] == 16
    assert read(root, size=8).train.pixels.shape[-1] == 8


def test_added_and_removed_files_are_seen(make_folder):
    root = make_folder()
    read(root)
    (root / "train/dog/3.png").rename(root / "train/cat/9.png")
    assert read(root).train.labels.tolist() == [0] * 5 + [1] * 3


def test_damaged_cache_is_made_again(make_folder, cache, decoded):
    root = make_folder()
    read(root)
    for path in (cache / "decoded").iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    read(root)
    assert len(decoded) == 32


def test_more_than_the_memory_holds_is_refused_before_decoding(make_folder, decoded):
    assert "set a smaller data.image_size" in message(make_folder(), size=10_000_000)
    assert not decoded


def test_files_that_are_no_images_by_their_ending_are_passed_over_and_counted(make_folder):
    root = make_folder(size=(16, 16))
    whole = read(root)
    for name in ("Thumbs.db", "notes.txt", "data.csv.gz"):
        (root / "train/cat" / name).write_bytes(b"something else")
    (root / "test/dog/3.png").rename(root / "test/dog/3.PNG")
    source = read(root)
    assert torch.equal(source.train.pixels, whole.train.pixels)
    assert torch.equal(source.test.pixels, whole.test.pixels)
    names = [line.partition(": ")[0] for line in source.skipped]
    assert names == [str(root / "train/cat" / name) for name in ("Thumbs.db", "data.csv.gz", "notes.txt")]
    (root / "train/cat/notes.txt").rename(root / "train/cat/notes.jpg")
    assert "notes.jpg: not an image" in message(root)  # what says that it is an image must be one


def test_every_ending_of_torchvisions_image_folder_is_read():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from lowcal.data.listing import ENDINGS

    assert set(IMG_EXTENSIONS) <= set(ENDINGS)


def test_a_class_without_an_image_by_its_ending_is_refused(make_folder):
    root = make_folder(size=(16, 16))
    for file in (root / "train/cat").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert "without a file of images" in message(root)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"pixels": torch.zeros(8, 3, 16, 16), "labels": torch.zeros(8, dtype=torch.int64), "skipped": []},
        {"pixels": torch.zeros(7, 3, 16, 16, dtype=torch.uint8), "labels": torch.zeros(7).long(), "skipped": []},
        {"pixels": "x", "labels": None, "skipped": 3},
        [1, 2],
    ],
)
def test_a_cache_that_holds_something_else_is_not_used(make_folder, monkeypatch, content):
    root = make_folder(size=(16, 16))
    whole = read(root)
    monkeypatch.setattr("lowcal.data.folder.read_cache", lambda *_: content)
    assert torch.equal(read(root).train.pixels, whole.train.pixels)
