"""A person's own network or images: a function in a file, written `my_nets.py:build`."""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lowcal.errors import LowcalError, nearest
from lowcal.files import first_line

MARK = ".py:"


def is_in_file(name: str) -> bool:
    """Whether `name` is that of a function in a file."""
    return MARK in name


def call(name: str, **given: Any) -> Any:
    """Call the function that `name` names, with those of the arguments `given` that it takes.

    Raises:
        LowcalError: the file cannot be read or run, has no such function, or the function fails.
    """
    path, function = _function(name)
    try:
        return function(**_taken(function, given))
    except LowcalError:
        raise
    except Exception as error:  # a person's code raises what it likes
        raise LowcalError(f"{name} failed: {_told(error, path)}; correct the file") from error


def takes(name: str, argument: str) -> bool:
    """Whether the function that `name` names takes `argument`; errors as `call`."""
    return bool(_taken(_function(name)[1], {argument: None}))


def digest(name: str) -> str:
    """Twelve hexadecimal digits that change when the file changes; LowcalError if it cannot be read."""
    return hashlib.sha256(_read(_path(name))).hexdigest()[:12]


def digests(*names: str) -> dict[str, str]:
    """The digests of those names that are of functions in files, by name."""
    return {name: digest(name) for name in names if is_in_file(name)}


def _path(name: str) -> Path:
    return Path(name[: name.index(MARK) + len(MARK) - 1]).expanduser()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise LowcalError(f"file {path} does not exist; check the path, which begins at {Path.cwd()}") from None
    except OSError as error:
        raise LowcalError(f"file {path} cannot be read ({error.strerror}); make it readable") from None


def _function(name: str) -> tuple[Path, Callable[..., Any]]:
    path, wanted = _path(name), name.rpartition(":")[2]
    module = _module(path.resolve(), _read(path))
    function = getattr(module, wanted, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise LowcalError(f"{path} has no function {wanted!r}{nearest(wanted, own)}")
    return path, function


@cache
def _module(path: Path, source: bytes) -> ModuleType:
    """Run a file as a module. Modules next to it can be imported, and no random state changes.

    Python's own import would take the compiled file of an earlier version, if the two have one size and one second.
    """
    module = ModuleType(f"{path.stem}_{hashlib.sha256(source).hexdigest()[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where classes of the file are looked up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        with torch.random.fork_rng([]):
            exec(compile(source, path, "exec"), vars(module))
    except Exception as error:
        del sys.modules[module.__name__]
        raise LowcalError(f"{path.name} does not import: {_told(error, path)}; correct the file") from error
    return module


def _taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}


def _told(error: Exception, path: Path) -> str:
    """What an error says, and the last line of the file in which it came about."""
    text, own = first_line(error).rstrip("."), str(path.resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    if isinstance(error, SyntaxError):
        text, lines = error.msg, [error.lineno]
    where = f" (line {lines[-1]})" if lines and lines[-1] else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"
