"""Run folders: the files that a run writes, which are all that the report reads."""

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowcal.errors import LowcalError
from lowcal.files import FORMAT, atomic_write, finite, first_line, read_json, refused, temporary, write_json
from lowcal.training.fields import EPOCH_FIELDS, IDENTITY_FIELDS, SUMMARY_FIELDS, check_fields

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "code_of", "digest"]

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
EPOCHS = "epochs.jsonl"
SUMMARY = "summary.json"
DIVERGED = "diverged.json"
STEP = "step.json"
CHECKPOINTS = "checkpoint*.pt"
LOGS = "logs"  # a folder with what loggers write


class RunFolder:
    """The folder of one training run.

    `recipe.yaml` is the recipe's text, `environment.json` the environment and the identity of the run, `epochs.jsonl`
    one JSON object per epoch, `summary.json` the results of a finished run. Checkpoints lie next to them. `step.json`
    says what `step="auto"` chose, `diverged.json` how a run diverged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._leave: Callable[[], object] | None = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(
        cls, path: Path, *, recipe: str, environment: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> "RunFolder":
        """Make a run's folder; `path` must not exist, or be empty or half made. Missing parents are made.

        `environment` is what `gather_environment` gives; `identity` names the run: method, recipe, seed, epochs
        (planned), model, dataset, label (or None). Raises LowcalError, and leaves nothing behind, if it cannot be made.
        """
        check_fields(identity, IDENTITY_FIELDS, path / ENVIRONMENT)
        _refuse_unless_free(path)
        made = _make_folders(path)
        folder = cls(path)
        try:
            atomic_write(path / EPOCHS, b"")
            write_json(path / ENVIRONMENT, {"format": FORMAT, **environment, "run": dict(identity)})
            atomic_write(path / RECIPE, recipe.encode())  # last: its presence makes the folder a run
        except BaseException:
            for name in (EPOCHS, ENVIRONMENT, RECIPE):
                (path / name).unlink(missing_ok=True)
            _remove_folders(made)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Return the run in an existing folder; LowcalError if there is none."""
        if not path.is_dir():
            raise LowcalError(f"{path} is not a folder; give the folder of a run")
        if cls.is_half_made(path):
            raise LowcalError(f"{path} was being made when its run was killed; start the run again, without --resume")
        if not cls.holds_run(path):
            raise LowcalError(f"{path} is not a run folder: it has no {RECIPE}; give the folder of a run")
        return cls(path)

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether the folder at `path` holds a run, finished or not."""
        return all((path / name).is_file() for name in (RECIPE, ENVIRONMENT, EPOCHS))

    @staticmethod
    def is_half_made(path: Path) -> bool:
        """Whether the folder at `path` has something in it, and only what a crash in `create` leaves."""
        if not path.is_dir():
            return False
        left = {EPOCHS, ENVIRONMENT, *(temporary(path / name).name for name in (EPOCHS, ENVIRONMENT, RECIPE))}
        try:
            names = {entry.name for entry in path.iterdir()}
            return bool(names) and names <= left and (EPOCHS not in names or not (path / EPOCHS).stat().st_size)
        except OSError as error:
            raise refused(path, error) from error

    def occupy(self) -> None:
        """Lock the folder: `may_be_replaced` is then False until this process ends or the run diverges."""
        if fcntl is not None:
            descriptor = os.open(self.path / EPOCHS, os.O_RDONLY)
            self._leave = weakref.finalize(self, os.close, descriptor)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def may_be_replaced(self) -> bool:
        """Whether the run has finished no epoch, is not occupied, and has diverged or has no checkpoint."""
        if self._lines() or (self.divergence() is None and any(self.path.glob(CHECKPOINTS))):
            return False
        if fcntl is None:
            return False
        with (self.path / EPOCHS).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks: another process may be at work
                return self.divergence() is not None
        return True

    def clear(self) -> None:
        """Remove the run. After a crash in between the folder still `may_be_replaced`, or is half made."""
        patterns = (CHECKPOINTS, ".*.tmp", "*.safetensors", SUMMARY, DIVERGED, STEP, RECIPE, ENVIRONMENT, EPOCHS)
        try:
            for path in [path for pattern in patterns for path in self.path.glob(pattern)]:
                path.unlink(missing_ok=True)
            if (self.path / LOGS).exists():
                shutil.rmtree(self.path / LOGS)
        except OSError as error:
            raise refused(self.path, error) from error

    def change(self, recipe: str, *, epochs: int) -> None:
        """Give the run another recipe and mark it as unfinished; its checkpoints stay valid.

        A crash in between leaves the old recipe or the new one, and a run that can continue with either.
        """
        value = read_json(self.path / ENVIRONMENT)
        earlier = [*self.earlier_recipes(), {"recipe": digest(self.recipe), "until_epoch": len(self._lines())}]
        value["run"] = {**value["run"], "epochs": epochs, "earlier": earlier}
        write_json(self.path / ENVIRONMENT, value)
        try:
            (self.path / SUMMARY).unlink(missing_ok=True)
        except OSError as error:
            raise refused(self.path / SUMMARY, error) from error
        atomic_write(self.path / RECIPE, recipe.encode())

    def earlier_recipes(self) -> list[dict[str, Any]]:
        """Return the recipes before each `change`: `recipe` is a digest, `until_epoch` a number of epochs."""
        return list(self.read_identity().get("earlier", []))

    def note_divergence(self, what: str) -> None:
        """Record how the run diverged; the next finished epoch removes the record."""
        write_json(self.path / DIVERGED, {"format": FORMAT, "what": what})
        if self._leave is not None:
            self._leave()

    def divergence(self) -> str | None:
        """Return how the run diverged; None if it did not."""
        path = self.path / DIVERGED
        return str(read_json(path).get("what")) if path.exists() else None

    @property
    def recipe(self) -> str:
        """The recipe's text as the run was started with it."""
        try:
            return (self.path / RECIPE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LowcalError(f"cannot read {self.path / RECIPE} ({first_line(error)}); restore it") from None

    def read_environment(self) -> dict[str, Any]:
        """Return the environment of the run (device, versions, commit, start) without its identity."""
        value = read_json(self.path / ENVIRONMENT)
        return {name: entry for name, entry in value.items() if name not in ("format", "run")}

    def read_identity(self) -> dict[str, Any]:
        """Return which run this is: method, recipe, seed, epochs (planned), model, dataset, label."""
        path = self.path / ENVIRONMENT
        identity = read_json(path).get("run")
        if not isinstance(identity, dict):
            raise LowcalError(f"{path} does not say which run it is (no 'run'); leave this folder out")
        check_fields(identity, IDENTITY_FIELDS, path)
        return identity

    def note_code(self, code: str) -> None:
        """Add to `environment.json` that the run continues with `code`, a digest; it then holds "FIRST+NEXT"."""
        value = read_json(self.path / ENVIRONMENT)
        made_by = code_of(value)
        if made_by.rpartition("+")[2] != code:
            self.write_json(ENVIRONMENT, {**value, "code": f"{made_by}+{code}"})

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's line to `epochs.jsonl`, on disk on return; a failed write leaves no part of it."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        path = self.path / EPOCHS
        try:
            with path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(before)
                    raise
            (self.path / DIVERGED).unlink(missing_ok=True)
        except OSError as error:
            raise refused(path, error) from error

    def read_epochs(self) -> list[dict[str, Any]]:
        """Return the records of all whole lines; a last line that a crash tore (no line end) is left out."""
        return [self._parse(line, index) for index, line in enumerate(self._lines())]

    def truncate(self, epochs: int) -> None:
        """Keep the first `epochs` lines, for resuming; a summary of more epochs than that is removed."""
        path = self.path / EPOCHS
        lines = self._lines()
        if epochs > len(lines):
            raise LowcalError(f"{path} has {len(lines)} epochs, not {epochs}; start a new run in another folder")
        try:
            if epochs < len(lines):
                (self.path / SUMMARY).unlink(missing_ok=True)
            with path.open("r+b") as file:
                file.truncate(sum(len(line) for line in lines[:epochs]))
                os.fsync(file.fileno())
        except OSError as error:
            raise refused(path, error) from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `value` atomically to the file `name` of this folder."""
        write_json(self.path / name, value)

    def summarise(self, **results: Any) -> dict[str, Any]:
        """Write the `summary.json` of all epochs in the log, with the method's own `results`; return what it holds."""
        records = self.read_epochs()
        last, best = records[-1], min(records, key=lambda record: record["top1_error"])
        return self.write_summary(
            {
                **self.read_identity(),
                "top1_error": last["top1_error"],
                "best_top1_error": best["top1_error"],
                "best_epoch": best["epoch"],
                "seconds": last["total_seconds"],
                "flops": sum(record["flops"] for record in records),
                "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
                "boundary": last["boundary"],
                "layers": last["layers"],
                **results,
            }
        )

    def write_summary(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write the finished run's `summary.json`; return what it holds: `summary` and the format."""
        value = {"format": FORMAT, **summary}
        check_fields(value, SUMMARY_FIELDS, self.path / SUMMARY)
        self.write_json(SUMMARY, value)
        return value

    def read_summary(self) -> dict[str, Any] | None:
        """Return the finished run's results, None while it has none."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        summary = read_json(path)
        check_fields(summary, SUMMARY_FIELDS, path)
        return summary

    def _lines(self) -> list[bytes]:
        path = self.path / EPOCHS
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LowcalError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error
        whole, end, _torn = data.rpartition(b"\n")
        return [line + b"\n" for line in whole.split(b"\n")] if end else []

    def _parse(self, line: bytes, index: int) -> dict[str, Any]:
        path = self.path / EPOCHS
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LowcalError(f"{path} is damaged at line {index + 1} ({first_line(error)}); resume the run") from error
        if not isinstance(record, dict):
            raise LowcalError(f"{path} is damaged at line {index + 1} (not an object); resume the run")
        check_fields(record, EPOCH_FIELDS, path, f"line {index + 1} of ")
        if record["epoch"] != index:
            raise LowcalError(f"line {index + 1} of {path} is epoch {record['epoch']!r}; resume the run")
        return record


def digest(recipe: str) -> str:
    """The digest that identifies a recipe's text."""
    return hashlib.sha256(recipe.encode()).hexdigest()


def code_of(environment: Mapping[str, Any]) -> str:
    """The code that made a run: its digest, in older runs the first twelve digits of the commit, else "unknown"."""
    return environment.get("code") or (environment.get("commit") or "unknown")[:12]


def _refuse_unless_free(path: Path) -> None:
    if RunFolder.holds_run(path):
        raise LowcalError(f"{path} holds a run already; continue it with --resume or choose another folder")
    if not path.is_dir():
        if os.path.lexists(path):
            raise LowcalError(f"{path} exists and is not a folder; choose another one")
        return
    if RunFolder.is_half_made(path):
        return
    try:
        inside = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise refused(path, error) from error
    if inside:
        raise LowcalError(f"{path} exists and is not a run (it holds {inside[0]!r}); choose another folder")


def _make_folders(path: Path) -> list[Path]:
    """Make `path` and its missing parents; return those made, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.insert(0, folder)
    except OSError as error:
        _remove_folders(made)
        raise refused(path, error) from error
    return made


def _remove_folders(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # another process may have put something there
            folder.rmdir()
