"""The command `lowcal`: what it answers, and how it ends.

A mistake by the user ends with exit code 2 and one line on standard error; Ctrl-C with 130, SIGTERM and SIGUSR1 with
75, each with a line that says how to go on; a closed pipe quietly with 141. Of several processes one speaks.

Importing this file takes milliseconds, so that `main` begins before anything can go wrong: Ctrl-C while torch is
imported, or a library that is not installed, is answered in one line too.
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

from lowcal.training.watchdog import INTERRUPTED, PREEMPTED, SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

MISTAKE = 2
CLOSED_PIPE = 141  # 128 + SIGPIPE
STOPPED = "stopped; nothing was written"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        with _ending_at_once():  # torch takes seconds
            from lowcal.commands import runs, studies  # noqa: F401  (each adds its commands to the program)
            from lowcal.training.allocator import keep_freed_memory
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # an output without UTF-8 shows '?' for '±'
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

    # Of click, or of typer where that brings a click of its own.
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
    except SystemExit:  # typer's own answer to a closed pipe
        return CLOSED_PIPE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return CLOSED_PIPE
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _end(f"{what}{error.strerror or error}; mend that and start again", MISTAKE)
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return _end(STOPPED, INTERRUPTED)
    return code or 0


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Within it a signal ends the program with one line: an exception can be lost in what is being imported."""

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
    from lowcal.training.launch import is_spokesman

    if is_spokesman():
        print("lowcal:", " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _usage(error: Any) -> str:
    """A mistake in the command line itself, with the nearest option or the place to look."""
    from lowcal.errors import nearest

    text = error.format_message()
    text = (text[:1].lower() + text[1:].rstrip(".")).replace("Input should be", "must be")
    context = error.ctx
    if hasattr(error, "possibilities") and context is not None:
        known = [name for option in context.command.params for name in option.opts]
        return f"there is no option '{error.option_name}'{_meant_setting(error) or nearest(error.option_name, known)}"
    if "did you mean" in text.lower():
        return text
    return f"{text}; see: {context.command_path if context else 'lowcal'} --help"


def _meant_setting(error: Any) -> str:
    """The `--set` that does what an option that does not exist was meant to do; "" where there is none."""
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
    """The value that `option` has among the command's `arguments`: `--epochs 3` or `--epochs=3`; None without one."""
    for argument, following in pairwise([*arguments, "--"]):
        name, equals, value = argument.partition("=")
        if name == option:
            value = value if equals else following
            return None if value.startswith("--") else value
    return None
