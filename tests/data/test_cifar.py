import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from lowcal.data.cifar import read_cifar10
from lowcal.errors import LowcalError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def fill(root, monkeypatch):
    """Write files of CIFAR-10's form with 20 images each, and make torchvision expect their checksums."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {}

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name):
        arrays[name] = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return write(name, {"data": arrays[name], "labels": [i % 10 for i in range(20)]})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return arrays


def test_torchvisions_files(tmp_path, monkeypatch):
    arrays = fill(tmp_path / "data", monkeypatch)
    source = read_cifar10(tmp_path / "data", "stop", download=True)
    assert source.classes == tuple(NAMES)
    assert source.train.pixels.shape == (100, 3, 32, 32)
    expected = torch.from_numpy(arrays["data_batch_2"]).view(20, 3, 32, 32)
    assert torch.equal(source.train.pixels[20:40], expected)
    assert source.test.labels.tolist() == [i % 10 for i in range(20)]


def test_without_a_folder_the_cache_is_read(cache, monkeypatch):
    fill(cache / "cifar10", monkeypatch)
    assert len(read_cifar10(None, "stop", download=False).train) == 100


def test_damaged_file_is_an_error_and_is_not_unpickled(tmp_path, monkeypatch):
    fill(tmp_path, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(LowcalError, match=r"cannot read CIFAR-10 from .*remove the damaged files"):
        read_cifar10(tmp_path, "stop", download=True)


def test_absent_without_download(tmp_path):
    with pytest.raises(LowcalError, match="cannot read CIFAR-10"):
        read_cifar10(None, "stop", download=False)


def test_no_network(monkeypatch):
    def fail(self):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(LowcalError, match=r"name resolution.*check the network") as caught:
        read_cifar10(None, "stop", download=True)
    assert "\n" not in str(caught.value)


def test_folder_of_images(make_folder):
    source = read_cifar10(make_folder(), "stop", download=True)
    assert source.classes == ("cat", "dog")
    assert source.train.pixels.shape == (8, 3, 32, 32)
    assert source.augmentation.pad == 4
    assert source.augmentation.flip


def test_folder_of_another_size_points_to_image_folder(make_folder):
    with pytest.raises(LowcalError, match=r"0.png: 48x32 pixels.*data.name=image-folder.*data.image_size"):
        read_cifar10(make_folder(size=(48, 32)), "stop", download=True)


@pytest.mark.parametrize("name", ["other", "nowhere"])
def test_a_given_folder_is_never_downloaded_into(tmp_path, name, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("downloaded"))
    (tmp_path / "other/holiday").mkdir(parents=True)
    with pytest.raises(LowcalError, match="--data-dir"):
        read_cifar10(tmp_path / name, "stop", download=True)
