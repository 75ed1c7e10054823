import os

import pytest
import torch

from lowcal.data.cache import cache_folder, read_cache, write_cache

CONTENT = {"pixels": torch.arange(200, dtype=torch.uint8), "skipped": [("a.jpg", "the file is empty")]}


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


@pytest.mark.parametrize("error", [KeyError("x"), EOFError(), MemoryError(), AttributeError("y"), OverflowError()])
def test_whatever_reading_raises_the_cache_is_as_if_absent(monkeypatch, error):
    write_cache("place", "key", CONTENT)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
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
    write_cache("place", "key", CONTENT)
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
