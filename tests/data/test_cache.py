import pytest
import torch

from lowcal.data import cache as module
from lowcal.data.cache import cache_folder, read_cache, write_cache

CONTENT = {"pixels": torch.arange(200, dtype=torch.uint8), "skipped": [("a.jpg", "the file is empty")]}


def stored():
    (path,) = (cache_folder() / "decoded").iterdir()
    return path


def test_round_trip():
    write_cache("place", "key", CONTENT)
    content = read_cache("place", "key")
    assert torch.equal(content["pixels"], CONTENT["pixels"])
    assert content["skipped"] == CONTENT["skipped"]


def test_other_place_or_key_is_absent():
    write_cache("place", "key", CONTENT)
    assert read_cache("place", "other") is None
    assert read_cache("elsewhere", "key") is None


def test_a_place_holds_one_file_and_no_debris():
    write_cache("place", "old", CONTENT)
    write_cache("place", "new", CONTENT)
    assert stored().suffix == ".pt"
    assert read_cache("place", "old") is None
    assert read_cache("place", "new") is not None


def test_truncation_at_any_length_is_found():
    write_cache("place", "key", CONTENT)
    whole = stored().read_bytes()
    for length in range(0, len(whole), 37):
        stored().write_bytes(whole[:length])
        assert read_cache("place", "key") is None


def test_flipped_bits_are_found():
    write_cache("place", "key", CONTENT)
    whole = stored().read_bytes()
    start = whole.index(b"\n")  # in the payload; a damaged header no longer matches
    for position in range(start + 1, len(whole), 29):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        stored().write_bytes(damaged)
        assert read_cache("place", "key") is None


@pytest.mark.parametrize("error", [KeyError("x"), EOFError(), MemoryError(), AttributeError("y"), OverflowError()])
def test_whatever_reading_raises_the_cache_is_as_if_absent(monkeypatch, error):
    write_cache("place", "key", CONTENT)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module.torch, "load", fail)
    assert read_cache("place", "key") is None


def test_failing_disk_is_no_error_and_leaves_no_debris(monkeypatch):
    write_cache("place", "key", CONTENT)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fail)
    write_cache("place", "new", CONTENT)
    assert read_cache("place", "key") is not None
    assert stored().suffix == ".pt"


@pytest.mark.parametrize("value", ["", None])
def test_home_is_used_without_xdg(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == tmp_path / ".cache" / "lowcal"
