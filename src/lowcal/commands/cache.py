"""The command that shows and clears the cache of images: cache."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowcal.commands.common import JsonOption, app, print_json
from lowcal.errors import LowcalError, nearest


@app.command()
def cache(
    action: Annotated[Literal["list", "clear"], typer.Argument(help="What to do.")] = "list",
    name: Annotated[str | None, typer.Argument(help="Of what to clear, as listed [default: all].")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Clear without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List or clear the cache of images.

    It holds decoded and downloaded ones.

    Example: lowcal cache clear cifar10
    """
    from lowcal.data.folders import cache_folder
    from lowcal.files import memory

    folder = cache_folder()
    entries = _entries(folder)
    if action == "clear":
        entries = [entry for entry in entries if name in (None, entry["name"])]
        if name is not None and not entries:
            raise LowcalError(f"the cache has no '{name}'{nearest(name, [one['name'] for one in _entries(folder)])}")
    total = sum(entry["bytes"] for entry in entries)
    if action == "clear" and entries:
        if not yes and not _agrees(f"Remove {', '.join(one['name'] for one in entries)} ({memory(total)})?"):
            print("nothing was removed")
            return
        for entry in entries:
            path = folder / entry["name"]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if as_json:
        print_json({"folder": str(folder), "bytes": total, action: entries})
    elif action == "clear":
        print(f"removed {', '.join(one['name'] for one in entries) or 'nothing'} ({memory(total)})")
    else:
        _show(folder, entries, total)


def _agrees(question: str) -> bool:
    if not sys.stdin.isatty():
        raise LowcalError("clearing the cache asks first, and there is no terminal to ask; give --yes")
    return typer.confirm(question)


def _show(folder: Path, entries: list[dict[str, Any]], total: int) -> None:
    from lowcal.files import memory
    from lowcal.report.table import Column, Table

    print(f"{folder}: {memory(total)}")
    if entries:
        columns = (Column("name", "name"), Column("bytes", "size", "memory"), Column("files", "files", "number"))
        print(f"\n{Table(columns, entries).text()}\n\nclear with: lowcal cache clear [NAME]")


def _entries(folder: Path) -> list[dict[str, Any]]:
    """What the cache holds: each decoded split, and each downloaded dataset, with its bytes and number of files."""
    from lowcal.data.folders import DECODED

    decoded = folder / DECODED
    paths = [path for path in (folder, decoded) if path.is_dir() for path in path.iterdir() if path != decoded]
    found = []
    for path in sorted(paths):
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        found.append({"name": path.relative_to(folder).as_posix(), "bytes": size, "files": len(files)})
    return found
