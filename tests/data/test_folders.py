"""Folders of image files: their layout, damaged files, and the cache of decoded images."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowcal.data import images
from lowcal.data.folders import _cached, cache_folder, read_folders
from lowcal.errors import LowcalError


def read(root, size=16, on_error="stop"):
    return read_folders(root, size, on_error, images.fit_cropped)


def message(root, **settings):
    with pytest.raises(LowcalError) as caught:
        read(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_labels(make_folder):
    root = make_folder(size=(16, 16), splits=("train", "val"))
    source = read(root)
    expected = np.asarray(Image.open(root / "val/dog/2.png")).transpose(2, 0, 1)
    assert torch.equal(source.test.pixels[6], torch.from_numpy(expected.copy()))
    assert source.classes == ("cat", "dog")
    assert source.train.pixels.shape == (8, 3, 16, 16)
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4
    assert source.augmentation.pad == 2
    assert source.skipped == ()


def test_shorter_side_is_scaled_and_the_middle_kept(make_folder):
    root = make_folder(size=(60, 20))
    strips = Image.new("RGB", (60, 20), "red")
    strips.paste("blue", (20, 0, 40, 20))
    strips.save(root / "train/cat/0.png")
    pixels = read(root, size=10).train.pixels[0]
    inner = pixels[:, :, 1:-1]  # the antialiasing filter reaches over the cut by one pixel
    assert inner[2].eq(255).all()
    assert inner[0].eq(0).all()


def test_nested_folders_are_read_and_hidden_files_are_not(make_folder):
    root = make_folder()
    (root / "train/cat/more").mkdir()
    shutil.copy(root / "train/cat/0.png", root / "train/cat/more/9.png")
    (root / "train/cat/.DS_Store").write_bytes(b"x")
    (root / "train/.cache").mkdir()
    assert read(root).train.labels.tolist() == [0] * 5 + [1] * 4


def test_folders_of_another_layout_are_described(make_folder, tmp_path):
    assert "no data folder" in message(tmp_path / "nowhere")
    root = make_folder(classes=("cat", "dog", "owl"))
    assert "must hold train/ and test/ (or val/); it holds cat, dog, owl" in message(root / "train")
    for file in (root / "train/owl").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert re.search("without a file of images.*: owl;", message(root))
    for split in ("train", "test"):
        shutil.rmtree(root / split / "owl")
        shutil.rmtree(root / split / "dog")
    assert "two or more classes; found only 'cat'" in message(root)
    shutil.rmtree(root / "train/cat")
    assert "two or more classes; found none" in message(root)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "test")
    assert "it holds nothing" in message(root)


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


def test_class_whose_files_are_all_skipped(make_folder):
    root = make_folder()
    for path in (root / "train/dog").iterdir():
        path.write_text("no image")
    assert "without one readable image: dog" in message(root, on_error="skip")


@pytest.fixture
def decoded(monkeypatch):
    """Count the files that are decoded."""
    files = []
    original = images.read_rgb
    monkeypatch.setattr(images, "read_rgb", lambda path, **options: files.append(path) or original(path, **options))
    return files


def test_files_are_decoded_once_until_one_changes(make_folder, cache, decoded):
    root = make_folder()
    first, second = read(root), read(root)
    assert len(decoded) == 16
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.labels, second.test.labels)
    Image.new("RGB", (32, 32), "red").save(root / "train/cat/0.png")
    assert read(root).train.pixels[0, 0].eq(255).all()
    assert len(decoded) == 16 + 8  # that split alone
    (root / "train/dog/3.png").rename(root / "train/cat/9.png")
    assert read(root).train.labels.tolist() == [0] * 5 + [1] * 3
    assert read(root, size=8).train.pixels.shape[-1] == 8  # a file of its own
    before = len(decoded)
    read(root)
    assert len(decoded) == before
    for path in (cache / "decoded").iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    read(root)
    assert len(decoded) == before + 16


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


CONTENT = {"pixels": torch.arange(200, dtype=torch.uint8), "skipped": [("a.jpg", "the file is empty")]}


def write_cache(place, key, content):
    _cached(Path(place), "use", key, lambda: content)


def read_cache(place, key):
    """What is stored; the file is left as it is if that is nothing."""

    class Absent(Exception):
        pass

    def absent():
        raise Absent

    with suppress(Absent):
        return _cached(Path(place), "use", key, absent)


def stored():
    (path,) = (cache_folder() / "decoded").iterdir()
    return path


def test_what_was_written_is_read_under_the_same_place_and_key_only():
    write_cache("place", "old", CONTENT)
    content = read_cache("place", "old")
    assert torch.equal(content["pixels"], CONTENT["pixels"])
    assert content["skipped"] == CONTENT["skipped"]
    write_cache("place", "new", CONTENT)
    assert stored().suffix == ".pt"
    assert read_cache("place", "new") is not None
    assert read_cache("place", "old") is None
    assert read_cache("elsewhere", "new") is None


def test_truncation_and_flipped_bits_are_found():
    write_cache("place", "key", CONTENT)
    whole = stored().read_bytes()
    for position in range(0, len(whole), 29):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        for content in (whole[:position], damaged):
            stored().write_bytes(content)
            assert read_cache("place", "key") is None


def test_a_full_disk_is_no_error_and_leaves_no_debris(monkeypatch):
    write_cache("place", "key", CONTENT)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    write_cache("place", "new", CONTENT)
    assert read_cache("place", "key") is not None
    assert stored().suffix == ".pt"


def test_two_processes_that_write_at_once_do_not_disturb_each_other(monkeypatch):
    """Two ranks decode the same folder: one is halfway through its file while the other finishes."""
    fsync, pids = os.fsync, iter((1, 2))
    monkeypatch.setattr(os, "getpid", lambda: next(pids))
    nested = []

    def halfway(descriptor):
        if not nested:
            nested.append(descriptor)
            write_cache("place", "key", {"pixels": CONTENT["pixels"] + 1})
            assert torch.equal(read_cache("place", "key")["pixels"], CONTENT["pixels"] + 1)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", halfway)
    write_cache("place", "key", CONTENT)
    assert torch.equal(read_cache("place", "key")["pixels"], CONTENT["pixels"])
    assert stored().suffix == ".pt"


@pytest.mark.parametrize("value", ["", None])
def test_home_is_used_without_xdg(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == tmp_path / ".cache" / "lowcal"
