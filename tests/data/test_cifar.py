"""CIFAR from torchvision's files or from folders of images."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from lowcal.data.datasets import read_cifar
from lowcal.errors import LowcalError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = [f"kind {number}" for number in range(100)]
READERS = {"cifar10": CIFAR10, "cifar100": CIFAR100}

both = pytest.mark.parametrize("name", READERS)


def fill(root, monkeypatch, name="cifar10"):
    """Write files of CIFAR's form with 20 images each, and make torchvision expect their checksums."""
    reader = READERS[name]
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {}

    def write(file, content):
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    def batch(file):
        arrays[file] = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        if name == "cifar10":
            return write(file, {"data": arrays[file], "labels": [i % 10 for i in range(20)]})
        fine = [99 - i for i in range(20)]
        return write(file, {"data": arrays[file], "fine_labels": fine, "coarse_labels": [i // 5 for i in fine]})

    train = [file for file, _ in reader.train_list]
    (test,) = (file for file, _ in reader.test_list)
    monkeypatch.setattr(reader, "train_list", [batch(file) for file in train])
    monkeypatch.setattr(reader, "test_list", [batch(test)])
    key = reader.meta["key"]
    file, md5 = write(reader.meta["filename"], {key: NAMES if name == "cifar10" else FINE})
    monkeypatch.setattr(reader, "meta", {"filename": file, "key": key, "md5": md5})
    return arrays


def message(*arguments, **settings):
    with pytest.raises(LowcalError) as caught:
        read_cifar(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_torchvisions_files_of_cifar10(tmp_path, monkeypatch):
    arrays = fill(tmp_path / "data", monkeypatch)
    source = read_cifar("cifar10", tmp_path / "data", "stop", download=True)
    assert source.classes == tuple(NAMES)
    assert source.train.pixels.shape == (100, 3, 32, 32)
    expected = torch.from_numpy(arrays["data_batch_2"]).view(20, 3, 32, 32)
    assert torch.equal(source.train.pixels[20:40], expected)
    assert source.test.labels.tolist() == [i % 10 for i in range(20)]


def test_torchvisions_files_of_cifar100_have_the_fine_classes(tmp_path, monkeypatch):
    arrays = fill(tmp_path / "data", monkeypatch, "cifar100")
    source = read_cifar("cifar100", tmp_path / "data", "stop", download=True)
    assert source.classes == tuple(FINE)
    assert torch.equal(source.train.pixels, torch.from_numpy(arrays["train"]).view(20, 3, 32, 32))
    assert torch.equal(source.test.pixels, torch.from_numpy(arrays["test"]).view(20, 3, 32, 32))
    assert source.test.labels.tolist() == [99 - i for i in range(20)]


@both
def test_without_a_folder_the_cache_is_read(cache, monkeypatch, name):
    fill(cache / name, monkeypatch, name)
    assert len(read_cifar(name, None, "stop", download=False).test) == 20


@both
def test_wrong_checksum_is_one_line_and_the_file_is_not_unpickled(tmp_path, monkeypatch, name):
    fill(tmp_path, monkeypatch, name)
    reader = READERS[name]
    file, md5 = reader.train_list[-1]
    path = tmp_path / reader.base_folder / file
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    text = message(name, tmp_path, "stop", download=True)
    assert f"{reader.base_folder}/{file} is damaged: its MD5 checksum is not {md5}; replace it, or leave out" in text
    assert text.startswith(f"cannot read {'CIFAR-10' if name == 'cifar10' else 'CIFAR-100'} from ")


@both
def test_missing_file_is_named(tmp_path, monkeypatch, name):
    fill(tmp_path, monkeypatch, name)
    meta = f"{READERS[name].base_folder}/{READERS[name].meta['filename']}"
    (tmp_path / meta).unlink()
    assert f"{meta} is missing" in message(name, tmp_path, "stop", download=True)


@both
def test_absent_without_download(name):
    text = message(name, None, "stop", download=False)
    assert "is missing; set data.download=true, or give a folder with --data-dir" in text


def test_no_network(monkeypatch):
    def fail(self):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(LowcalError, match=r"name resolution.*check the network") as caught:
        read_cifar("cifar10", None, "stop", download=True)
    assert "\n" not in str(caught.value)


def test_folder_of_images(make_folder):
    source = read_cifar("cifar10", make_folder(), "stop", download=True)
    assert source.classes == ("cat", "dog")
    assert source.train.pixels.shape == (8, 3, 32, 32)
    assert source.augmentation.pad == 4
    assert source.augmentation.flip


def test_folder_of_another_size_points_to_image_folder(make_folder):
    with pytest.raises(LowcalError, match=r"0.png: 48x32 pixels.*data.name=image-folder.*data.image_size"):
        read_cifar("cifar10", make_folder(size=(48, 32)), "stop", download=True)


@pytest.mark.parametrize("name", ["other", "nowhere"])
def test_a_given_folder_is_never_downloaded_into(tmp_path, name, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("downloaded"))
    (tmp_path / "other/holiday").mkdir(parents=True)
    with pytest.raises(LowcalError, match="--data-dir"):
        read_cifar("cifar10", tmp_path / name, "stop", download=True)
