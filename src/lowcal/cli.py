"""The command `lowcal`: its entry point, its error lines and its exit codes.

A mistake by the user ends with exit code 2 and one line on standard error. Ctrl-C ends with 130, SIGTERM and SIGUSR1
with 75, each with a line that says how to continue. A closed pipe ends with 141 and no line. One of several processes
prints.

Importing this file takes milliseconds, so that `main` also handles Ctrl-C during the import of torch, and a library
that is not installed.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lowcal.training.signals import INTERRUPTED, PREEMPTED, SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

MISTAKE = 2
CLOSED_PIPE = 141  # 128 + SIGPIPE
STOPPED = "stopped; nothing was written"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        with _exit_on_signal():  # imports take seconds
            from lowcal.commands import cache, info, predict, runs, studies  # noqa: F401  (each adds its commands to `app`)
            from lowcal.training.process import keep_freed_memory
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # without UTF-8, '±' becomes '?'
        keep_freed_memory()
        return _answer(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "lowcal":
            raise
        return _end(f"{missing} is not installed, which the command needs; pip install 'lowcal[cli]'", MISTAKE)


def _answer(arguments: list[str]) -> int:
    import typer

    from lowcal.commands.common import Stopped, app
    from lowcal.errors import LowcalError

    # From click, or from typer's own copy of click.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        code = app(arguments, prog_name="lowcal", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
    except LowcalError as error:
        return _end(str(error), MISTAKE)
    except usage_error as error:
        return _end(_usage(error), MISTAKE)
    except Stopped as stop:
        return _end(str(stop), stop.code)
    except (KeyboardInterrupt, typer.Abort):
        return _end(STOPPED, INTERRUPTED)
    except SystemExit as end:  # typer ends so after completion, and with 1 at a closed pipe
        return CLOSED_PIPE if end.code else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drops what is still buffered
        return CLOSED_PIPE
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _end(f"{what}{error.strerror or error}; fix that and start again", MISTAKE)
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return _end(STOPPED, INTERRUPTED)
    return code or 0


@contextmanager
def _exit_on_signal() -> Iterator[None]:
    """Exit with one line at a signal: an import may lose an exception."""

    def end(number: int, frame: FrameType | None) -> None:
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"lowcal: {STOPPED.replace(';', f'{by};')}\n".encode())
        os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(message: str, code: int) -> int:
    from lowcal.training.process import reports_end

    if reports_end():
        print("lowcal:", " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _usage(error: Any) -> str:
    """Return the line for a mistake in the command line, with the nearest option or the command's --help."""
    from lowcal.errors import nearest

    text = error.format_message()
    text = (text[:1].lower() + text[1:].rstrip(".")).replace("Input should be", "must be")
    context = error.ctx
    if hasattr(error, "option_name") and hasattr(error, "possibilities") and context is not None:
        known = [name for option in context.command.params for name in option.opts]
        return f"there is no option '{error.option_name}'{_meant_setting(error) or nearest(error.option_name, known)}"
    if "did you mean" in text.lower():
        return text
    return f"{text}; see: {context.command_path if context else 'lowcal'} --help"


def _meant_setting(error: Any) -> str:
    """Return a hint at the `--set` that an unknown option was meant to be; "" if there is none."""
    options = [name for option in error.ctx.command.params for name in option.opts]
    if "--set" not in options:
        return ""
    from lowcal.experiments.recipe_text import setting_meant_by

    key = setting_meant_by(error.option_name.lstrip("-").replace("-", "_"))
    if key is None:
        return ""
    value = _value_of(error.option_name, error.ctx.obj)
    return f"; use --set {key}=VALUE" if value is None else f"; use --set {shlex.quote(f'{key}={value}')}"


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return the value of `option` in `arguments` (`--epochs 3` or `--epochs=3`); None without one."""
    for argument, following in pairwise([*arguments, "--"]):
        name, equals, value = argument.partition("=")
        if name == option:
            value = value if equals else following
            return None if value.startswith("--") else value
    return None
