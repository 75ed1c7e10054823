"""A hook of mkdocs for links from the pages to files of the repository outside docs/.

With `repo_url` set, such a link leads to the file there; without it, the link becomes the name of the file. A picture
is copied into the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

# Code comes first, so that a link within it stays as it is.
_LINK = re.compile(r"```.*?```|`[^`\n]*`(?!\])|(!?)\[((?:[^\[\]])*)\]\(([^()\s#]+)(#[^()\s]*)?\)", re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's text with its links to files outside docs/ replaced."""
    root = Path(config.config_file_path).parent
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replaced(match: re.Match[str]) -> str:
        picture, text, target = match[1], match[2], match[3]
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/") or not (root / path).exists():
            return match[0]
        if picture:
            place = f"files/{path}"
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(root / path)))
            return f"![{text}]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')})"
        if config.repo_url:
            kind = "tree" if (root / path).is_dir() else "blob"
            return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{match[4] or ''})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)
