import json
import os
import resource
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowcal.errors import LowcalError
from lowcal.files import atomic_write, read_json, write_json
from lowcal.training.run_folder import RunFolder, code_of

IDENTITY = {
    "method": "local",
    "recipe": "digits",
    "seed": 3,
    "epochs": 4,
    "model": "resnet8",
    "dataset": "digits",
    "label": None,
}
SUMMARY = {
    **IDENTITY,
    "top1_error": 4.5,
    "best_top1_error": 4.0,
    "seconds": 12.5,
    "flops": 10**12,
    "peak_memory_bytes": 10**7,
    "boundary": 3,
    "layers": 9,
}


def epoch_record(epoch, **changes):
    return {
        "epoch": epoch,
        "boundary": epoch // 2,
        "layers": 9,
        "train_loss": 1.0 / (epoch + 1),
        "test_loss": 1.2 / (epoch + 1),
        "top1_error": 20.0 - epoch,
        "seconds": 2.5,
        "total_seconds": 2.5 * (epoch + 1),
        "steps": 20,
        "step_ms": 125.0,
        "images_per_second": 512.0,
        "lr": 0.05,
        "batch": 64,
        "flops": 10**9,
        "peak_memory_bytes": 10**7,
        "local_lr": None,
        "sign": 1,
        "transition_change": 0.25,
        "skipped_updates": 0,
        **changes,
    }


def make_run(path, epochs=0):
    folder = RunFolder.create(path, recipe="name: digits\n", environment={"device": "cpu"}, identity=IDENTITY)
    for epoch in range(epochs):
        folder.append(epoch_record(epoch))
    return folder


def files(path):
    return sorted(entry.name for entry in path.rglob("*"))


def test_create_makes_parents_and_what_is_written_is_read(tmp_path):
    folder = make_run(tmp_path / "a" / "b")
    assert files(tmp_path / "a" / "b") == ["environment.json", "epochs.jsonl", "recipe.yaml"]
    assert RunFolder.holds_run(folder.path)
    again = RunFolder.open(folder.path)
    assert again.recipe == "name: digits\n"
    assert again.read_environment() == {"device": "cpu"}
    assert again.read_identity() == IDENTITY
    assert again.read_epochs() == []
    assert again.read_summary() is None


def test_create_takes_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not RunFolder.is_half_made(tmp_path / "empty")
    make_run(tmp_path / "empty")


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("call", range(1, 7))
def test_a_creation_that_crashed_is_recognised_and_done_anew(tmp_path, monkeypatch, call):
    """At each opening and each renaming of a file."""
    path, calls = tmp_path / "run", iter(range(1, 10))

    def crash(name):
        whole = getattr(Path, name)

        def changed(self, *args):
            if next(calls) == call:
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a crash cleans nothing up
                raise Crash
            return whole(self, *args)

        monkeypatch.setattr(Path, name, changed)

    with monkeypatch.context() as monkeypatch:
        crash("open")
        crash("replace")
        with pytest.raises(Crash):
            make_run(path)
    assert not RunFolder.holds_run(path)
    assert RunFolder.is_half_made(path) == (call > 1)
    if call > 1:
        with pytest.raises(LowcalError, match="start the run again, without --resume"):
            RunFolder.open(path)
    make_run(path, epochs=1)
    assert files(path) == ["environment.json", "epochs.jsonl", "recipe.yaml"]


@pytest.mark.parametrize("left", [{"epochs.jsonl": "{}"}, {"recipe.yaml": ""}, {"epochs.jsonl": "", "thesis.txt": ""}])
def test_what_no_crash_in_creation_leaves_is_not_touched(tmp_path, left):
    for name, content in left.items():
        (tmp_path / name).write_text(content)
    assert not RunFolder.is_half_made(tmp_path)
    with pytest.raises(LowcalError, match="exists and is not a run"):
        make_run(tmp_path)
    assert files(tmp_path) == sorted(left)


def test_create_refuses_a_run_a_strange_folder_and_a_file(tmp_path):
    make_run(tmp_path / "run", epochs=1)
    with pytest.raises(LowcalError, match=r"holds a run already.*--resume"):
        make_run(tmp_path / "run")
    assert len(RunFolder.open(tmp_path / "run").read_epochs()) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(LowcalError, match=r"not a run \(it holds 'thesis.txt'\)"):
        make_run(tmp_path / "mine")
    assert files(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(LowcalError, match="not a folder"):
        make_run(tmp_path / "file")
    with pytest.raises(LowcalError, match="cannot write"):
        make_run(tmp_path / "file" / "below")


def test_create_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LowcalError, match="No space left on device"):
        make_run(tmp_path / "a" / "b")
    assert files(tmp_path) == []


def test_create_wants_the_whole_identity(tmp_path):
    with pytest.raises(LowcalError, match="'seed'"):
        RunFolder.create(tmp_path / "run", recipe="", environment={}, identity={**IDENTITY, "seed": "one"})
    identity = {name: value for name, value in IDENTITY.items() if name != "model"}
    with pytest.raises(LowcalError, match="lacks 'model'"):
        RunFolder.create(tmp_path / "run", recipe="", environment={}, identity=identity)
    assert files(tmp_path) == []


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(LowcalError, match="is not a folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(LowcalError, match=r"not a run folder.*recipe\.yaml"):
        RunFolder.open(tmp_path)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(epochs=st.integers(1, 5), data=st.data())
def test_a_log_cut_anywhere_keeps_its_whole_lines_and_can_go_on(tmp_path, epochs, data):
    folder = make_run(tmp_path / f"{len(files(tmp_path))}", epochs)
    log = folder.path / "epochs.jsonl"
    whole = log.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    log.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert folder.read_epochs() == [epoch_record(epoch) for epoch in range(complete)]
    keep = data.draw(st.integers(0, complete))
    folder.truncate(keep)
    for epoch in range(keep, epochs):
        folder.append(epoch_record(epoch))
    assert log.read_bytes() == whole


def test_truncate_drops_a_summary_of_more_epochs_and_refuses_to_invent(tmp_path):
    folder = make_run(tmp_path / "run", epochs=4)
    folder.write_summary(SUMMARY)
    folder.truncate(4)
    assert folder.read_summary() == {"format": 1, **SUMMARY}
    with pytest.raises(LowcalError, match="has 4 epochs, not 5"):
        folder.truncate(5)
    folder.truncate(2)
    assert folder.read_summary() is None
    assert len(folder.read_epochs()) == 2


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    folder = make_run(tmp_path / "run")
    folder.append(epoch_record(0, test_loss=float("nan"), train_loss=float("inf")))
    assert folder.read_epochs()[0]["test_loss"] is None
    write_json(tmp_path / "x.json", {"format": 1, "rows": [{"a": float("-inf"), "b": (1, 2.5)}]})
    assert read_json(tmp_path / "x.json") == {"format": 1, "rows": [{"a": None, "b": [1, 2.5]}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"epoch": 1', "damaged at line 2"),
        ("[]", "line 2"),
        (json.dumps({"epoch": 1}), "lacks 'boundary'"),
        (json.dumps(epoch_record(5)), "is epoch 5"),
        (json.dumps(epoch_record(1, seconds=None)), "'seconds' is None"),
        (json.dumps(epoch_record(1, step_ms="fast")), "'step_ms' is 'fast'"),
        (json.dumps(epoch_record(1, boundary=True)), "'boundary' is True"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    folder = make_run(tmp_path / "run", epochs=1)
    with (folder.path / "epochs.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(LowcalError, match=message) as caught:
        folder.read_epochs()
    assert str(folder.path / "epochs.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("\x00\xff", "damaged"),
        ("[]", "not written by lowcal"),
        ("{}", "not written by lowcal"),
        ('{"format": 2}', "format 2, this lowcal reads 1"),
        ('{"format": 1, "method": "sgd"}', "lacks"),
    ],
)
def test_a_damaged_summary_is_named(tmp_path, text, message):
    folder = make_run(tmp_path / "run", epochs=1)
    (folder.path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(LowcalError, match=message) as caught:
        folder.read_summary()
    assert str(folder.path / "summary.json") in str(caught.value)


def test_atomic_write_replaces_follows_the_umask_and_uses_a_left_file_again(tmp_path):
    path = tmp_path / "checkpoint.pt"
    (tmp_path / ".checkpoint.pt.tmp").write_bytes(b"left by a killed process, longer than what comes")
    atomic_write(path, b"old")
    atomic_write(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert files(tmp_path) == ["checkpoint.pt"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_atomic_write_names_a_folder_that_is_gone(tmp_path):
    with pytest.raises(LowcalError, match=r"cannot write .*gone.x: No such file"):
        atomic_write(tmp_path / "gone" / "x", b"")


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2)
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(LowcalError, match="File too large"):
            folder.append({"filler": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_run_that_goes_on_under_other_code_is_of_both(tmp_path):
    environment = {"device": "cpu", "code": "aaaa00000000", "commit": "e1a58719"}
    folder = RunFolder.create(tmp_path / "run", recipe="name: digits\n", environment=environment, identity=IDENTITY)
    folder.note_code("aaaa00000000")
    assert folder.read_environment() == environment
    folder.note_code("bbbb00000000")
    folder.note_code("bbbb00000000")
    assert folder.read_environment() == {**environment, "code": "aaaa00000000+bbbb00000000"}
    assert folder.read_identity() == IDENTITY


def test_a_run_without_a_digest_is_known_by_its_commit():
    assert code_of({"commit": "0123456789abcdef"}) == "0123456789ab"
    assert code_of({"commit": None}) == code_of({}) == "unknown"
    assert code_of({"code": "aaaa00000000", "commit": "0123456789abcdef"}) == "aaaa00000000"
