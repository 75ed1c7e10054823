"""The release: workflows call what exists, notes come from the changelog, and the wheel works by itself."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lowcal

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))

spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci" / "release_notes.py")
release_notes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_notes)


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path):
    return [step for job in jobs(path).values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists(path):
    for command in (step["run"] for step in steps(path) if "run" in step):
        words = command.split()
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= TARGETS
        for word in words:
            if word.startswith((".ci/", "tests/")):
                assert (ROOT / word).exists(), word
    for name, job in jobs(path).items():
        assert job.get("needs") in {None, *jobs(path)}
        if "uses" in job:
            assert (ROOT / job["uses"]).exists()
        else:
            assert job["timeout-minutes"] <= 60, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_action_has_a_version_and_a_workflow_few_rights(path):
    assert all(re.search(r"@(v\d+|release/v\d+)$", step["uses"]) for step in steps(path) if "uses" in step)
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


def test_artifacts_that_are_read_were_written():
    uploaded = {step["with"]["name"] for path in WORKFLOWS for step in steps(path) if "upload-artifact" in str(step)}
    asked = {step["with"].get("name") for path in WORKFLOWS for step in steps(path) if "download-artifact" in str(step)}
    assert asked - {None} <= uploaded == {"dist", "notes"}


def test_the_tests_run_on_each_supported_python():
    (matrix,) = [job["strategy"]["matrix"]["python"] for job in jobs(WORKFLOWS[0]).values() if "strategy" in job]
    assert matrix[0] == re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert matrix == ["3.11", "3.12", "3.13", "3.14"]


def test_the_makefile_knows_its_targets_and_no_other_torch():
    assert {"demo", "test", "lint", "types", "docs", "dist"} <= TARGETS
    plan = subprocess.run(["make", "-n", "demo", "TORCH=cpu", "VENV=none"], cwd=ROOT, capture_output=True, text=True)
    assert "--index-url https://download.pytorch.org/whl/cpu torch torchvision" in plan.stdout
    plan = subprocess.run(["make", "-n", "demo", "VENV=none"], cwd=ROOT, capture_output=True, text=True)
    assert "index-url" not in plan.stdout
    assert "TORCH=cpu" in plan.stdout
    refused = subprocess.run(["make", "-n", "demo", "TORCH=gpu"], cwd=ROOT, capture_output=True, text=True)
    assert "TORCH=gpu is unknown" in refused.stderr


def test_the_version_is_written_once():
    version = re.compile(rf"(?<![\d.]){re.escape(lowcal.__version__)}(?![\d.])")
    files = ["pyproject.toml", "CITATION.cff", "Makefile", *(str(path.relative_to(ROOT)) for path in WORKFLOWS)]
    assert not [name for name in files if version.search((ROOT / name).read_text())]


def test_notes_are_the_section_of_the_changelog():
    changelog = "# Changes\n\n## [Unreleased]\n- c\n\n## [0.3.0] - 2027-01-01\n### Added\n- b\n\n## [0.2.0]\n- a\n"
    assert release_notes.notes("v0.3.0", changelog, '__version__ = "0.3.0"') == "### Added\n- b"
    assert release_notes.notes("v0.2.0", changelog, '__version__ = "0.2.0"') == "- a"
    with pytest.raises(ValueError, match="does not have the version"):
        release_notes.notes("v0.3.0", changelog, '__version__ = "0.2.0"')
    with pytest.raises(ValueError, match="no section"):
        release_notes.notes("v0.4.0", changelog, '__version__ = "0.4.0"')


@pytest.mark.slow
def test_wheel_and_sdist_are_built_and_work(tmp_path):
    pytest.importorskip("build")
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True)
    subprocess.run([sys.executable, ROOT / ".ci" / "check_dist.py", tmp_path], check=True)
