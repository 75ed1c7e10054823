"""Output folders: whether they can be written to, and whether they hold the same experiment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lowcal.errors import LowcalError
from lowcal.experiments.arms import Watcher
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import differences, parse_recipe
from lowcal.training.environment import code_digest
from lowcal.training.run_folder import RunFolder, code_of
from lowcal.user_files import digests


def refuse_unwritable(path: Path) -> None:
    """Check that `path`, which may not exist yet, can be written to; nothing is left behind.

    Raises:
        LowcalError: it cannot.
    """
    made: list[Path] = []
    try:
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise LowcalError(f"cannot write to {path}: {error.strerror}; choose another --out") from None
    finally:
        for folder in reversed(made):
            folder.rmdir()


def refuse_used(path: Path, kind: str) -> None:
    """Refuse a path that exists and is not an empty folder; `kind` says what it should be.

    A temporary file that a crash left in the first write to the folder is ignored.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise LowcalError(f"{path} is not a folder; choose another --out")
    inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    inside = [name for name in inside if not (name.startswith(".") and name.endswith(".tmp"))]
    if inside:
        raise LowcalError(f"{path} exists and is not {kind} (it holds '{inside[0]}'); choose another --out")


def recipe_in(folder: Path) -> Recipe:
    """The recipe with which the run in `folder` was started."""
    return parse_recipe(RunFolder.open(folder).recipe, str(folder / "recipe.yaml"))


def name_other_code(folders: Iterable[Path], watcher: Watcher) -> None:
    """Tell the watcher which of the runs in `folders` were made by other code than this."""
    made = {folder.name: code_of(RunFolder(folder).read_environment()) for folder in folders}
    others = [f"{name} ({code})" for name, code in made.items() if code != code_digest()]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        watcher.note(f"made by other code than this ({code_digest()}): {', '.join(others[:3])}{more}")


def refuse_another_recipe(folder: Path, recipe: Recipe, *, but_for: frozenset[str] = frozenset()) -> None:
    """Refuse a run that was started with other settings than `recipe`; the message names the first that differs.

    So is a run whose network or images come from a file that has changed.

    Args:
        but_for: keys that may differ.
    """
    changed = [line for line in differences(recipe_in(folder), recipe) if line.partition(" ")[0] not in but_for]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LowcalError(
            f"{folder} was started with another recipe: {changed[0]}{more}; "
            "continue with that one or choose another --out"
        )
    refuse_changed_files(folder, recipe)


def refuse_changed_files(folder: Path, recipe: Recipe) -> None:
    """Refuse a run whose network or images come from a file that has changed since it was started."""
    before = RunFolder(folder).read_environment().get("files", {})
    for name, now in digests(recipe.model.name, recipe.data.name).items():
        if before.get(name, now) != now:
            raise LowcalError(
                f"{name.rpartition(':')[0]} has changed since {folder} was started (digest {before[name]} there, "
                f"{now} here); restore the file or start a new run"
            )
