"""The commands that train networks and show runs: compare, train, layers, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowcal.commands.common import (
    BudgetOption,
    DataDirOption,
    DeterministicOption,
    DeviceOption,
    QuietOption,
    RecipeOption,
    SetOption,
    app,
    budget_settings,
    free_folder,
    resumable,
)
from lowcal.errors import LowcalError
from lowcal.training.process import Launch

if TYPE_CHECKING:
    from lowcal.report.page import Report


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
    elif context.invoked_subcommand != "train" and Launch.read().world > 1:
        raise LowcalError(
            f"lowcal {context.invoked_subcommand} is for one process; start it without torchrun, "
            "which is for lowcal train"
        )


@app.command()
def compare(
    context: typer.Context,
    recipe: RecipeOption = "digits",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; sgd-compressed: SGD in their time [default: sgd,local,freeze; with "
            "given weights sgd,freeze,sgd-compressed]."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds counted up.")] = 1,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the runs and the report [default: runs/RECIPE, or -2, -3 ...].")
    ] = None,
    settings: SetOption = None,
    budget: BudgetOption = None,
    device: DeviceOption = "auto",
    deterministic: DeterministicOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network by several methods in turn, and report.

    An interrupted comparison goes on where it stopped when it is started again with the same --out.
    """
    from lowcal.console import Display
    from lowcal.experiments.recipe_text import apply_settings, as_dict, load_recipe
    from lowcal.report.headline import title

    changes = [*budget_settings(budget), *(settings or []), *(["deterministic=true"] * deterministic)]
    chosen = apply_settings(load_recipe(recipe), changes)
    folder = out or free_folder(Path("runs") / chosen.name)
    more = [] if out else ["--out", str(folder)]
    methods = methods or ("sgd,freeze,sgd-compressed" if chosen.model.weights else "sgd,local,freeze")
    names = [name.strip() for name in methods.split(",")]
    with resumable(context, folder, more, chosen.checkpoint.grace), Display(quiet=quiet) as display:
        many = f"{seeds} seed{'s' * (seeds > 1)} each"
        display.note(f"{title(as_dict(chosen))}: {', '.join(names)}, {many}; in {folder}")
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
    print()
    _show(result)


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
    extend: Annotated[
        bool, typer.Option("--extend", help="With --resume: for more epochs, of which --set epochs=N gives all.")
    ] = False,
    settings: SetOption = None,
    budget: BudgetOption = None,
    device: DeviceOption = "auto",
    deterministic: DeterministicOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train one network by one method.

    Under torchrun each process takes its share of each mini-batch: torchrun --nproc-per-node N -m lowcal train ...
    """
    from lowcal.console import Display
    from lowcal.experiments.recipe_text import apply_settings, as_dict, load_recipe
    from lowcal.report.headline import title
    from lowcal.report.table import duration

    launch = Launch.read()
    if extend and not resume:
        raise LowcalError("--extend goes on with a run that is there: give --resume too")
    if out is None and (resume or launch.may_restart):
        why = "--resume needs" if resume else "torchrun --max-restarts needs"
        raise LowcalError(f"{why} the run's folder: give it with --out")
    changes = [*budget_settings(budget), *(settings or []), *(["deterministic=true"] * deterministic)]
    chosen = load_recipe(recipe or "digits")
    if recipe or not resume:
        chosen = apply_settings(chosen, changes)

    from lowcal.experiments.assemble import find_device  # these take seconds, so mistakes in settings come first
    from lowcal.experiments.train import started_with
    from lowcal.experiments.train import train as run
    from lowcal.methods import find_method
    from lowcal.training.distributed import joined

    with joined(find_device(device, launch)) as group:
        if resume and out is not None:
            kept, kept_method = started_with(out, group)
            chosen, method = (chosen if recipe else apply_settings(kept, changes)), method or kept_method
        method = method or "local"
        find_method(method)  # refuses an unknown one before anything is said of the run
        folder = out or Path(group.from_main(lambda: str(free_folder(Path("runs") / f"{chosen.name}-{method}"))))
        more = ([] if resume else ["--resume"]) + ([] if out else ["--out", str(folder)])
        grace = chosen.checkpoint.grace
        with resumable(context, folder, more, grace), Display(quiet=quiet or not group.is_main) as display:
            among = f" by {group.world} processes" if group.world > 1 else ""
            display.note(f"{title(as_dict(chosen))}: {method}{among}; in {folder}")
            summary = run(
                chosen,
                method,
                folder,
                resume=resume,
                extend=extend,
                data_dir=data_dir,
                group=group,
                watcher=display,
            )
    if not group.is_main:
        return
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
    """List a network's layers in the order in which they run."""
    from lowcal.console import layers_text
    from lowcal.experiments.describe import describe
    from lowcal.models import MODELS
    from lowcal.report.table import amount

    pixels = image_size or (32 if model in MODELS else 224)
    network = describe(model, classes=classes, channels=channels, image_size=pixels, width=width, epochs=epochs)
    rows = [row.__dict__ for row in network.layers]
    if as_json:
        print(json.dumps(network.as_dict(), indent=2))
        return
    print(f"{model} for images of {channels}x{pixels}x{pixels}\n")
    print(layers_text(rows))
    flops, parameters = (sum(row[key] for row in rows) for key in ("flops", "parameters"))
    print(f"\n{len(rows)} layers, {parameters:,} parameters, {amount(flops)}FLOPs forward for one image")
    print(
        f"default schedule over {epochs} epochs: {network.shift} layers a move, {network.interval} epochs between "
        f"moves at least, {network.most_local} layers at most"
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
) -> None:
    """Make a table and an HTML page from run folders."""
    from lowcal.report.page import write_report

    _show(write_report(runs, out))


def _show(report: Report) -> None:
    """Print a report's table, and what a reader must know beside it."""
    from lowcal.console import comparison_text, paragraph

    summary = report.summary
    seeds = sorted({row["seeds"] for row in summary["rows"]})
    many = " to ".join(str(count) for count in (seeds[0], *seeds[1:][-1:])) + f" seed{'s' * (seeds[-1] > 1)}"
    print(paragraph(f"{summary['title']}; {many}; {summary['environment']['device_name']}"))
    print(paragraph(f"recipe: {summary['label'] or summary['recipe']}"))
    print(f"\n{comparison_text(summary['rows'])}\n")
    print("speed-up, FLOPs: against sgd; memory: peak of a step→in the last epoch")
    for note in (*report.notes, report.headline):
        print(paragraph(note))
    print(f"report: {report.page}")
