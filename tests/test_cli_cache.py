"""`lowcal cache`: what is in the cache of images, and clearing it."""

import io
import json

import pytest

from lowcal.cli import main
from lowcal.data import load
from lowcal.data.folders import cache_folder

from .commands import folders, refused

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def filled(here):
    """A cache with two decoded splits and a downloaded dataset."""
    load("image-folder", data_dir=folders(here / "pets", {"cat": 2, "dog": 2}), image_size=8)
    (cache_folder() / "cifar10").mkdir()
    (cache_folder() / "cifar10" / "archive").write_bytes(b"x" * 3000)
    return cache_folder()


def listed(capsys):
    assert main(["cache", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_cache_is_listed(filled, capsys):
    content = listed(capsys)
    names = [entry["name"] for entry in content["list"]]
    assert names[0] == "cifar10"
    assert [name[:26] for name in names[1:]] == ["decoded/pets-test-fit_crop", "decoded/pets-train-fit_cro"]
    assert content["bytes"] == sum(file.stat().st_size for file in filled.rglob("*") if file.is_file())
    assert main(["cache"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{filled}: ")
    assert "2.93 KiB" in text


def test_one_entry_or_all_are_cleared(filled, capsys):
    assert main(["cache", "clear", "cifar10", "--yes"]) == 0
    assert capsys.readouterr().out == "removed cifar10 (2.93 KiB)\n"
    assert len(listed(capsys)["list"]) == 2
    assert main(["cache", "clear", "--yes", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["clear"]) == 2
    assert listed(capsys) == {"folder": str(filled), "bytes": 0, "list": []}


@pytest.mark.parametrize(("answer", "left"), [("n\n", 3), ("y\n", 0)])
def test_clearing_asks(filled, capsys, monkeypatch, answer, left):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["cache", "clear"]) == 0
    assert "Remove cifar10, decoded/pets-" in capsys.readouterr().out
    assert len(listed(capsys)["list"]) == left


def test_mistakes(filled, capsys):
    refused(["cache", "clear"], "give --yes", capsys)
    refused(["cache", "clear", "cifar100", "--yes"], "did you mean 'cifar10'", capsys)
    refused(["cache", "delete"], "'delete'", capsys)
    assert len(listed(capsys)["list"]) == 3


def test_an_absent_cache_is_empty(here, capsys):
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.endswith("lowcal: 0 B\n")


def test_many_files_are_announced_before_they_are_decoded(here, monkeypatch):
    monkeypatch.setattr("lowcal.data.folders.MANY", 4)
    root, said = folders(here / "pets", {"cat": 3, "dog": 3}), []

    class Watcher:
        def note(self, text):
            said.append(text)

        def stage(self, text, done=0, total=0):
            said.append((text, done, total))

    options = {"data_dir": root, "image_size": 8, "watcher": Watcher()}
    load("image-folder", **options)
    train = [f"decoding 6 images of {root / 'train'}, once: the result is kept in {cache_folder()} (1.12 KiB); "
             "lowcal cache lists and clears it", ("decoding", 6, 6), ("", 0, 0)]  # fmt: skip
    assert said[:3] == train
    assert len(said) == 6
    load("image-folder", **options)
    assert len(said) == 6
