"""Prints the section of CHANGELOG.md for a version, and fails unless it is that of the package.

python .ci/release_notes.py v0.3.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, changelog: str, source: str) -> str:
    """Return the section of `tag`; ValueError if there is none, or `source` has another version."""
    version = tag.removeprefix("v")
    if f'__version__ = "{version}"' not in source:
        raise ValueError(f"src/lowcal/__init__.py does not have the version {version}")
    section = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if section is None or not section[1].strip():
        raise ValueError(f"CHANGELOG.md has no section [{version}]")
    return section[1].strip()


if __name__ == "__main__":
    files = (ROOT / "CHANGELOG.md", ROOT / "src" / "lowcal" / "__init__.py")
    try:
        print(notes(sys.argv[1], *(file.read_text(encoding="utf-8") for file in files)))
    except ValueError as error:
        sys.exit(f"release_notes: {error}")
