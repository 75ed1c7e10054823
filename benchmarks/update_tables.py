"""Puts committed results into the documentation.

Between `<!-- table: FILE -->` and `<!-- end -->` in README.md and docs/*.md stands the content of FILE, a Markdown
file under results/. Run this after FILE has changed; a test checks that nothing differs.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """The documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def updated(text: str) -> str:
    """`text` with each marked table as its file has it now."""
    return MARKED.sub(lambda match: match[1] + (ROOT / match[2]).read_text().strip() + "\n" + match[3], text)


if __name__ == "__main__":
    for document in documents():
        text = document.read_text()
        if updated(text) != text:
            document.write_text(updated(text))
            print(f"updated {document.relative_to(ROOT)}")
