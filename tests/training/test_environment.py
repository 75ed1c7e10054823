import shutil
import subprocess
from pathlib import Path

import pytest

from lowcal.training.environment import PACKAGE, code_digest, gather_environment, training_command


def package(path):
    """A small package's files in the folder `path`."""
    (path / "inner").mkdir(parents=True)
    (path / "one.py").write_text("x = 1\n")
    (path / "inner" / "two.py").write_text("y = 2\n")
    return path


def test_the_digest_is_of_the_names_and_contents_of_the_source_files(tmp_path):
    original = package(tmp_path / "a")
    digest = code_digest(original)
    assert len(digest) == 12
    assert int(digest, 16) >= 0
    assert code_digest(package(tmp_path / "elsewhere")) == digest
    (tmp_path / "elsewhere" / "notes.txt").write_text("no code")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "with notes")
    assert code_digest(tmp_path / "with notes") == digest
    changed = package(tmp_path / "changed")
    (changed / "inner" / "two.py").write_text("y = 3\n")
    renamed = package(tmp_path / "renamed")
    (renamed / "one.py").rename(renamed / "inner" / "one.py")
    fewer = package(tmp_path / "fewer")
    (fewer / "one.py").unlink()
    assert len({digest, *map(code_digest, (changed, renamed, fewer))}) == 4


def test_a_copy_of_the_package_has_its_digest(tmp_path):
    """As an installed package has that of the clone it was made from."""
    copied = shutil.copytree(PACKAGE, tmp_path / "lowcal")
    assert code_digest(copied) == code_digest() == gather_environment("cpu")["code"]


def test_environment_says_what_ran():
    environment = gather_environment("cpu")
    assert environment["device"] == "cpu"
    assert environment["threads"] >= 1
    assert set(environment) == {
        "device", "device_name", "processor", "cores", "torch", "torchvision", "lowcal", "python", "platform",
        "threads", "code", "commit", "started",
    }  # fmt: skip
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    if head.returncode == 0 and environment["commit"]:
        assert environment["commit"].removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/usr/bin/lowcal", "compare", "--set", "label=two words"], "lowcal compare --set 'label=two words'"),
        (["/x/lowcal/__main__.py", "train"], "lowcal train"),
        (["/x/other/__main__.py", "train"], None),
        (["lowcal", "sweep", "--storage", "postgresql://user:secret@host"], None),
        (["mine.py", "compare", "--token", "secret"], None),
        (["lowcal"], None),
    ],
)
def test_the_command_is_kept_if_it_trains_or_compares(monkeypatch, arguments, command):
    monkeypatch.setattr("sys.argv", arguments)
    assert training_command() == command
