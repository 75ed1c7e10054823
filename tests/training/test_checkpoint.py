import hashlib
import io
import pickle
import random
import resource
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lowcal import LowcalError
from lowcal.training.checkpoint import (
    FORMAT,
    NEXT,
    PRESENT,
    PREVIOUS,
    load_checkpoint,
    save_checkpoint,
    settle,
)

from ..support import same

MAGIC = b"lowcal-checkpoint"


def state(epoch: int) -> dict:
    return {
        "finished": epoch,
        "model": OrderedDict(weight=torch.full((3, 2), float(epoch)), count=torch.tensor(epoch)),
        "none": None,
        "rng": torch.get_rng_state(),
        "nested": {"pairs": [[1, 2], [3, 4]], "name": "x", "rate": 0.1, "on": True},
    }


def loaded(folder: Path) -> int:
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    epoch = checkpoint.state.pop("finished")
    assert checkpoint.state.pop("format") == FORMAT
    assert same({"finished": epoch, **checkpoint.state}, state(epoch))
    return epoch


def wrapped(payload: bytes) -> bytes:
    return b"%s %s %d\n" % (MAGIC, hashlib.sha256(payload).hexdigest().encode(), len(payload)) + payload


class Evil:
    """What does harm as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path):
    """One with the checkpoints of the epochs 1 (previous) and 2 (present)."""
    for epoch in (1, 2):
        save_checkpoint(tmp_path, state(epoch))
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_is_loaded_and_the_one_before_it_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for epoch in range(1, 5):
        save_checkpoint(tmp_path, state(epoch))
        assert loaded(tmp_path) == epoch
        assert load_checkpoint(tmp_path).skipped == ()
    assert names(tmp_path) == {PRESENT, PREVIOUS}
    (tmp_path / PRESENT).unlink()
    assert loaded(tmp_path) == 3


def test_a_truncated_file_is_skipped(folder):
    whole = (folder / PRESENT).read_bytes()
    generator = random.Random(0)
    for length in {0, 1, len(MAGIC), 80, 90, 91, len(whole) - 1, *generator.sample(range(len(whole)), 50)}:
        (folder / PRESENT).write_bytes(whole[:length])
        assert loaded(folder) == 1
        (note,) = load_checkpoint(folder).skipped
        assert str(folder / PRESENT) in note
        assert "\n" not in note
    (folder / PRESENT).write_bytes(whole + b"\0")
    assert loaded(folder) == 1


def test_a_flipped_bit_is_noticed(folder):
    whole = (folder / PRESENT).read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        # One half of them in the first line, where a checksum does not reach.
        damaged[generator.randrange(100 if generator.random() < 0.5 else len(whole))] ^= 1 << generator.randrange(8)
        (folder / PRESENT).write_bytes(damaged)
        checkpoint = load_checkpoint(folder)
        assert checkpoint.path == folder / PREVIOUS
        assert len(checkpoint.skipped) == 1


def test_the_checkpoint_gone_on_from_outlives_the_damaged_one(folder):
    (folder / PRESENT).write_bytes(b"damaged")
    settle(load_checkpoint(folder).path)
    assert loaded(folder) == 1
    assert load_checkpoint(folder).skipped == ()
    save_checkpoint(folder, state(3))
    (folder / PRESENT).write_bytes(b"damaged too")
    assert loaded(folder) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a checkpoint of lowcal"),
        (b"PK\x03\x04" + bytes(500), "is not a checkpoint of lowcal"),
        (b"epoch 1\n" * 100, "is not a checkpoint of lowcal"),
        (bytes(range(256)) * 40, "is not a checkpoint of lowcal"),
        (wrapped(b""), "holds something other"),
        (wrapped(b"nothing that torch.save wrote"), "holds something other"),
    ],
)
def test_a_foreign_file_is_skipped(folder, content, reason):
    (folder / PRESENT).write_bytes(content)
    assert loaded(folder) == 1
    assert reason in load_checkpoint(folder).skipped[0]


@pytest.mark.parametrize("value", [3, [1, 2], {"model": 1}])
def test_what_is_no_state_is_skipped(folder, value):
    file = io.BytesIO()
    torch.save(value, file)
    (folder / PRESENT).write_bytes(wrapped(file.getvalue()))
    assert loaded(folder) == 1


def test_a_malicious_pickle_runs_nothing(folder, tmp_path):
    trap = tmp_path / "sprung"
    inside = io.BytesIO()
    torch.save({"format": 1, "model": Evil(trap)}, inside)
    plain = pickle.dumps(Evil(trap))
    for content in (plain, wrapped(plain), inside.getvalue(), wrapped(inside.getvalue())):
        (folder / PRESENT).write_bytes(content)
        assert loaded(folder) == 1
        assert not trap.exists()
    pickle.loads(plain)
    assert trap.exists()  # it would have


def test_when_none_can_be_used_one_line_says_so(folder):
    for name in (PRESENT, PREVIOUS):
        (folder / name).write_bytes((folder / name).read_bytes()[:-5])
    with pytest.raises(LowcalError, match="no checkpoint can be used") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert PRESENT in str(error.value)
    assert PREVIOUS in str(error.value)


def test_a_checkpoint_of_another_version_is_named(folder):
    file = io.BytesIO()
    torch.save({"format": 7}, file)
    (folder / PRESENT).write_bytes(wrapped(file.getvalue()))
    with pytest.raises(LowcalError, match=f"has checkpoint format 7, this lowcal reads {FORMAT}"):
        load_checkpoint(folder)


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_renaming_leaves_a_checkpoint(folder, monkeypatch, damaged, call, after):
    if damaged:
        (folder / PRESENT).write_bytes(b"damaged")
    last = 1 if damaged else 2
    calls = iter(range(1, 10))
    replace = Path.replace

    def crash(path, target):
        if next(calls) == call:
            if after:
                replace(path, target)
            raise Crash
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(Crash):
            save_checkpoint(folder, state(3))
    assert loaded(folder) in ((last, 3) if call == 1 else (3,))
    save_checkpoint(folder, state(4))
    assert loaded(folder) == 4
    assert NEXT not in names(folder)


def test_a_full_disk_leaves_both_checkpoints_and_no_debris(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(LowcalError, match="cannot write") as error:
            save_checkpoint(folder, state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(LowcalError, match="cannot write"):
        save_checkpoint(tmp_path / "gone", state(1))
