"""What the commands share: the app, options, default folders, and the end of a run by a signal."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from lowcal.commands import complete
from lowcal.errors import LowcalError
from lowcal.files import finite
from lowcal.method_settings import NEEDED
from lowcal.training.process import Launch, is_lost
from lowcal.training.signals import INTERRUPTED, PREEMPTED, Interrupted, catch_signals, ignore_signals

app = typer.Typer(
    name="lowcal",
    help="Train CNNs with less work: the first layers learn locally as training goes on.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

RecipeOption = Annotated[
    str,
    typer.Option("--recipe", help="A recipe's name, or the path of a recipe file.", autocompletion=complete.recipes),
]
MethodOption = Annotated[str, typer.Option("--method", help="How to train.", autocompletion=complete.methods)]
ModelOption = Annotated[
    str,
    typer.Option(
        help="A network's name, as `lowcal list models` gives, or FILE.py:FUNCTION.", autocompletion=complete.models
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; can be repeated.")
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the images [default: ~/.cache/lowcal].")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DeterministicOption = Annotated[
    bool, typer.Option("--deterministic", help="The same as --set deterministic=true: slower on a GPU.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="BUDGET",
        help="1.5x: the latest moves that save this much time. '0.5 memory': steps with this part of the memory.",
    ),
]
LogOption = Annotated[
    str | None,
    typer.Option("--log", metavar="LOGGERS", help="Also log to tensorboard, csv, mlflow, wandb; separated by commas."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document; notes go to standard error.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the results alone.")]


def notes_apart(as_json: bool = True) -> AbstractContextManager[object]:
    """With `as_json` what is printed within it goes to standard error, so that standard output has one document."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def print_json(value: Any) -> None:
    """Print a JSON document; a number that is not finite is null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


class Stopped(Exception):
    """A signal stopped a run; the message says how to go on, `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def resumable(context: typer.Context, folder: Path, more: Sequence[str], grace: float | None = 30.0) -> Iterator[None]:
    """Raise `Stopped` at a signal or at the end of another process, with the command that resumes the run.

    Args:
        more: arguments that the command needs to resume.
        grace: seconds after a signal until a program that does not end is killed; None: no limit.
    """
    go_on = f"go on with: {_program()} {shlex.join([*context.obj, *more])}"
    try:
        with catch_signals(
            math.inf if grace is None else grace,
            folder=str(folder),
            advice=go_on if Launch.read().rank == 0 else "",
        ):
            try:
                yield
            except RuntimeError as error:
                if is_lost(error):
                    ignore_signals()  # torchrun sends SIGTERM, which must not suppress the last message
                raise
        return
    except KeyboardInterrupt as error:
        what, code = "stopped", INTERRUPTED
        if isinstance(error, Interrupted) and error.signal != signal.SIGINT:
            what, code = f"stopped by {error.signal.name}", PREEMPTED
    except RuntimeError as error:
        if not is_lost(error):
            raise
        what, code = "stopped, since another process of the run has ended or does not answer", PREEMPTED
    if not folder.exists() or not any(folder.iterdir()):
        raise Stopped(f"{what}; nothing was written", code)
    raise Stopped(f"{what}; {go_on}", code)


def _program() -> str:
    launch = Launch.read()
    if launch.world == 1:
        return "lowcal"
    here = f"--nproc-per-node {launch.local_world}" if launch.world == launch.local_world else "..."
    return f"torchrun {here} -m lowcal"


def budget_settings(budget: str | None) -> list[str]:
    """Return the settings of `--budget 1.5x` or `--budget "0.5 memory"`."""
    if budget is None:
        return []
    key = "memory" if budget.endswith("memory") else "speedup"
    try:
        number = float(budget.removesuffix("memory" if key == "memory" else "x"))
    except ValueError:
        raise LowcalError(
            f"--budget {budget}: is neither a speed-up nor a part of the memory; write it as in --budget 1.5x or "
            "--budget '0.5 memory'"
        ) from None
    others = "".join(f", {each}: null" for keys in NEEDED.values() for each in keys)  # of the recipe's own schedule
    return [f"local.schedule={{name: budget, {key}: {number}{others}}}"]
