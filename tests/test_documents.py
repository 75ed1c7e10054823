"""The documentation quotes committed results, and links to what exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("update_tables", ROOT / "benchmarks" / "update_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

DOCUMENTS = tables.documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    text = path.read_text()
    assert tables.updated(text) == text, "run benchmarks/update_tables.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_readme_shows_the_example_that_is_run():
    readme = (tables.ROOT / "README.md").read_text()
    example = (tables.ROOT / "examples" / "plain_loop.py").read_text()
    added = re.findall(r"^\+ (.*)$", readme, re.MULTILINE)
    assert len(added) == 4  # two lines, and two for the fast step, which docs/step.md shows
    assert all(call.split("(")[0].strip() in example for call in added[:2])
