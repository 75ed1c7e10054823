"""The command `lowcal`: parses, calls, prints.

A mistake by the user ends with exit code 2 and one line on standard error; Ctrl-C with 130, SIGTERM and SIGUSR1 with
75, each with a line that says how to go on; a closed pipe quietly with 141.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import typer

from lowcal.errors import LowcalError, nearest
from lowcal.training.interrupt import Interrupted, catch_signals

MISTAKE = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same again later will do
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
CLOSED_PIPE = 141  # 128 + SIGPIPE

UsageError: type[Exception] = typer.BadParameter.__bases__[
    0
]  # of click, or of typer where that brings a click of its own

app = typer.Typer(
    name="lowcal",
    help="Train CNNs with less work: the first layers learn locally as training goes on.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

RecipeOption = Annotated[str, typer.Option("--recipe", help="A recipe's name, or the path of a recipe file.")]
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
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the results alone.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"lowcal {installed('lowcal')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def compare(
    context: typer.Context,
    recipe: RecipeOption = "digits",
    methods: Annotated[str, typer.Option(help="Methods to compare, separated by commas.")] = "sgd,local,freeze",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds counted up.")] = 1,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the runs and the report [default: runs/RECIPE, or -2, -3 ...].")
    ] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    deterministic: DeterministicOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the same network by several methods in turn, and report.

    An interrupted comparison goes on where it stopped when it is started again with the same --out.
    """
    from lowcal.console import Display, comparison_table
    from lowcal.experiments.recipe_files import apply_settings, load_recipe

    chosen = apply_settings(load_recipe(recipe), [*(settings or []), *(["deterministic=true"] * deterministic)])
    folder = out or _free_folder(Path("runs") / chosen.name)
    more = [] if out else ["--out", str(folder)]
    names = [name.strip() for name in methods.split(",")]
    with _resumable(context, folder, more), Display(quiet=quiet) as display:
        display.note(f"{chosen.label}: {', '.join(names)}, {seeds} seed{'s' * (seeds > 1)} each; in {folder}")
        from lowcal.experiments.assemble import find_device  # these take seconds, so the line above comes first
        from lowcal.experiments.compare import compare as run

        result = run(
            chosen,
            names,
            seeds,
            folder,
            data_dir=data_dir,
            device=find_device(device),
            watcher=display,
        )
    print(f"\n{_title(result.summary)}\n\n{comparison_table(result.summary['rows'])}\n")
    print("speed-up, FLOPs: against sgd; memory: peak of a step; boundary: at the end")
    print(f"report: {result.page}")


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A recipe's name or file [default: digits; or the resumed run's].")
    ] = None,
    method: Annotated[str | None, typer.Option(help="How to train [default: local; or the resumed run's].")] = None,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run [default: runs/RECIPE-METHOD, or -2, -3 ...].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    deterministic: DeterministicOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train one network by one method."""
    from lowcal.console import Display
    from lowcal.experiments.assemble import find_device
    from lowcal.experiments.recipe_files import apply_settings, load_recipe
    from lowcal.experiments.train import started_with
    from lowcal.experiments.train import train as run
    from lowcal.report.tables import duration

    if resume and out is None:
        raise LowcalError("--resume needs the run's folder: give it with --out")
    if resume and out is not None:
        kept, kept_method = started_with(out)
        base, method = (kept if recipe is None else load_recipe(recipe)), method or kept_method
    else:
        base, method = load_recipe(recipe or "digits"), method or "local"
    chosen = apply_settings(base, [*(settings or []), *(["deterministic=true"] * deterministic)])
    folder = out or _free_folder(Path("runs") / f"{chosen.name}-{method}")
    more = ([] if resume else ["--resume"]) + ([] if out else ["--out", str(folder)])
    with _resumable(context, folder, more), Display(quiet=quiet) as display:
        display.note(f"{chosen.label}: {method}; in {folder}")
        summary = run(
            chosen,
            method,
            folder,
            resume=resume,
            data_dir=data_dir,
            device=find_device(device),
            watcher=display,
        )
    print(
        f"{method}: top-1 error {summary['top1_error']:.2f} %, training {duration(summary['seconds'])}, "
        f"boundary {summary['boundary']}/{summary['layers']}"
    )
    print(f"run: {folder}")


@app.command()
def layers(
    model: Annotated[str, typer.Option(help="A network's name: resnet18, resnet8, or one of torchvision's.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images [default: 32, torchvision's 224].")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes.")] = 10,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 3,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first stage.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that the schedule is worked out for.")] = 90,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List a network's layers in the order in which they run, with the cost of each."""
    from lowcal.console import amount, layers_table
    from lowcal.experiments.describe import describe
    from lowcal.models import MODELS

    pixels = image_size or (32 if model in MODELS else 224)
    network = describe(model, classes=classes, channels=channels, image_size=pixels, width=width, epochs=epochs)
    rows = [row.__dict__ for row in network.layers]
    if as_json:
        print(json.dumps(network.as_dict(), indent=2))
        return
    print(f"{model} for images of {channels}x{pixels}x{pixels}\n")
    print(layers_table(rows))
    flops, parameters = (sum(row[key] for row in rows) for key in ("flops", "parameters"))
    print(f"\n{len(rows)} layers, {parameters:,} parameters, {amount(flops)}FLOPs forward for one image")
    print(
        f"default schedule over {epochs} epochs: {network.shift} layers a move, {network.interval} epochs between "
        f"moves at least, {network.most_local} layers at most"
    )


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="A network's name: resnet18, resnet8, or one of torchvision's.")],
    batch: Annotated[int, typer.Option(help="Images in a mini-batch.")] = 64,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images [default: 32, torchvision's 224].")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes.")] = 10,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first stage.")] = None,
    boundaries: Annotated[
        str, typer.Option(help="Boundaries as fractions of the layers, separated by commas.")
    ] = "0,0.25,0.5,0.75",
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Keep channels last in memory.")] = False,
    step: Annotated[str, typer.Option(help="How a step is run: eager.")] = "eager",
    every: Annotated[int, typer.Option(help="Also with local updates in each n-th step; 1: not.")] = 4,
    epochs: Annotated[int, typer.Option(help="Of the whole run that is predicted.")] = 90,
    rounds: Annotated[int, typer.Option(help="Samples of each time.")] = 20,
    layer_times: Annotated[bool, typer.Option("--layer-times/--no-layer-times", help="Time each layer.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the picture, .svg or .png.")] = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Measure a training step at each boundary, beside a plain loop and the least that it can take."""
    from lowcal.console_bench import bench_text
    from lowcal.experiments.assemble import find_device
    from lowcal.experiments.bench import bench as run
    from lowcal.experiments.bench_settings import BenchSettings, parse_boundaries
    from lowcal.models import MODELS
    from lowcal.training.record import atomic_write

    for file in (json_file, plot):  # found now, not after minutes of measuring
        if file and not file.parent.is_dir():
            raise LowcalError(f"{file}: there is no folder {file.parent}; make it or name another file")
    if plot and plot.suffix not in (".svg", ".png"):
        raise LowcalError(f"--plot {plot}: give a name that ends in .svg or .png")
    settings = BenchSettings(
        model=model,
        batch=batch,
        image_size=image_size or (32 if model in MODELS else 224),
        classes=classes,
        width=width,
        boundaries=parse_boundaries(boundaries),
        precision=precision,
        channels_last=channels_last,
        step=step,
        every=every,
        epochs=epochs,
        rounds=rounds,
        layers=layer_times,
    )
    result = run(settings, find_device(device), (lambda text: None) if quiet else print).as_dict()
    print(bench_text(result))
    if json_file:
        atomic_write(json_file, (json.dumps(result, indent=1) + "\n").encode())
    if plot:
        from lowcal.experiments.bench_plot import plot as draw

        draw(result, plot)


@app.command()
def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="TABLE", help="table1 to table8, or figure3 to figure6.")],
    cells: Annotated[
        str | None, typer.Option(help="Only these, separated by commas, as --dry-run names them; * and ? fit anything.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell, with seeds counted up.")] = 1,
    scale: Annotated[str, typer.Option(help="full (as published), small or tiny.")] = "full",
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and how long.")] = False,
    data_dir: DataDirOption = None,
    out: Annotated[Path, typer.Option(help="Folder of all results; tables share their runs.")] = Path("runs/reproduce"),
    settings: SetOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Run a table or figure of the paper, and show its figures beside the published ones.

    Runs that are in the folder already are not trained again; interrupted ones go on where they stopped.
    """
    from lowcal.console import Display
    from lowcal.experiments.assemble import find_device
    from lowcal.experiments.reproduce import dry_run, plan_text
    from lowcal.experiments.reproduce import reproduce as run
    from lowcal.experiments.reproduction.results import Results
    from lowcal.experiments.reproduction.scales import find_scale

    results = Results(out, find_scale(scale), settings=settings or [], data_dir=data_dir)
    where = find_device(device)
    if dry:
        print(plan_text(*dry_run(name, results, seeds=seeds, cells=cells, device=where)))
        return
    with _resumable(context, out, []), Display(quiet=quiet) as display:
        found = run(name, results, seeds=seeds, cells=cells, device=where, watcher=display)
    print(f"\n{found.sheet.text()}\n")
    print(f"written: {', '.join(str(file) for file in found.files)}")


@app.command()
def sweep(
    context: typer.Context,
    search: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=...", help="Setting to search: low:high, low:high:log or a,b,c; can be repeated."),
    ] = None,
    recipe: RecipeOption = "digits",
    method: Annotated[str, typer.Option(help="How to train.")] = "local",
    trials: Annotated[int | None, typer.Option(help="Trials, over all workers [a grid: all combinations].")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each trial, whose mean counts.")] = 1,
    objective: Annotated[
        str, typer.Option(help="What to minimise: top1_error, best_top1_error, seconds, flops; or several, by commas.")
    ] = "top1_error",
    sampler: Annotated[str, typer.Option(help="How to choose settings: tpe, random or grid.")] = "tpe",
    storage: Annotated[str | None, typer.Option(help="URL of a database [default: SQLite in the folder].")] = None,
    study: Annotated[str | None, typer.Option(help="Name in the database [default: RECIPE-METHOD].")] = None,
    lease: Annotated[
        float, typer.Option(help="Seconds without a sign of life after which a worker's trial is taken up by another.")
    ] = 60.0,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and results [default: runs/sweep-RECIPE-METHOD, or -2 ...].")
    ] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Search settings of a method by many trials, each evaluated on held-out training images.

    The same command with the same --out, here or on another machine, adds a worker or goes on.
    """
    from lowcal.console import Display
    from lowcal.console_sweep import sweep_text
    from lowcal.experiments.recipe_files import load_recipe
    from lowcal.experiments.sweep import plan_sweep
    from lowcal.experiments.sweep import sweep as run

    plan = plan_sweep(
        load_recipe(recipe),
        method,
        search or [],
        settings=settings or [],
        trials=trials,
        seeds=seeds,
        objective=objective,
        sampler=sampler,
        study=study,
        storage=storage,
        lease=lease,
    )
    folder = out or _free_folder(Path("runs") / f"sweep-{plan.recipe.name}-{method}")
    more = [] if out else ["--out", str(folder)]
    with _resumable(context, folder, more), Display(quiet=quiet) as display:
        display.note(f"{plan.recipe.label}: {method}, {plan.trials} trials; in {folder}")
        from lowcal.experiments.assemble import find_device

        result = run(plan, folder, data_dir=data_dir, device=find_device(device), watcher=display)
    print(f"\n{sweep_text(result.summary)}\n")
    print(f"results: {', '.join(str(file) for file in result.files)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
) -> None:
    """Make tables, figures and one HTML page from run folders."""
    from lowcal.console import comparison_table
    from lowcal.report import write_report

    result = write_report(runs, out)
    print(f"{comparison_table(result.summary['rows'])}\n\nreport: {result.page}")


class _Stopped(Exception):
    """A signal in a run; the message says how to go on, `code` is the command's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def _resumable(context: typer.Context, folder: Path, more: Sequence[str]) -> Iterator[None]:
    """Turns a signal into the command that goes on: the present one with the arguments `more`."""
    try:
        with catch_signals():
            yield
    except KeyboardInterrupt as error:
        by, code = "", INTERRUPTED
        if isinstance(error, Interrupted) and error.signal != signal.SIGINT:
            by, code = f" by {error.signal.name}", PREEMPTED
        if not folder.exists():
            raise _Stopped(f"stopped{by}; nothing was written", code) from None
        raise _Stopped(f"stopped{by}; go on with: {shlex.join(['lowcal', *context.obj, *more])}", code) from None


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or with the first of -2, -3, ... added that does not exist yet."""
    candidates = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    return next(path for path in chain([wanted], candidates) if not os.path.lexists(path))


def _title(summary: Mapping[str, Any]) -> str:
    environment = summary["environment"]
    return f"{summary['label']}: {summary['dataset']}, {environment['device_name']}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an output without UTF-8 shows '?' for '±'
    try:
        code = app(arguments, prog_name="lowcal", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
    except LowcalError as error:
        return _end(str(error), MISTAKE)
    except UsageError as error:
        return _end(_usage(error), MISTAKE)
    except _Stopped as stop:
        return _end(str(stop), stop.code)
    except (KeyboardInterrupt, typer.Abort):
        return _end("stopped; nothing was written", INTERRUPTED)
    except SystemExit:  # typer's own answer to a closed pipe
        return CLOSED_PIPE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return CLOSED_PIPE
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _end(f"{what}{error.strerror or error}; mend that and start again", MISTAKE)
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return _end("stopped; nothing was written", INTERRUPTED)
    return code or 0


def _end(message: str, code: int) -> int:
    print("lowcal:", " ".join(message.split()), file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """A mistake in the command line itself, with the nearest option or the place to look."""
    text = error.format_message()
    text = (text[:1].lower() + text[1:].rstrip(".")).replace("Input should be", "must be")
    context = error.ctx
    if hasattr(error, "possibilities") and context is not None:
        known = [name for option in context.command.params for name in option.opts]
        return f"there is no option '{error.option_name}'{nearest(error.option_name, known)}"
    if "did you mean" in text.lower():
        return text
    return f"{text}; see: {context.command_path if context else 'lowcal'} --help"
