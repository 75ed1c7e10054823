"""The commands that train networks and show runs: compare, train, layers, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowcal import __version__
from lowcal.commands import complete
from lowcal.commands.common import (
    BudgetOption,
    DataDirOption,
    DeterministicOption,
    DeviceOption,
    JsonOption,
    LogOption,
    ModelOption,
    QuietOption,
    RecipeOption,
    SetOption,
    app,
    budget_settings,
    notes_apart,
    print_json,
    resumable,
)
from lowcal.errors import LowcalError
from lowcal.files import free_folder, read_json
from lowcal.training.process import Launch


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"lowcal {__version__}")
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
            "given weights sgd,freeze,sgd-compressed].",
            autocompletion=complete.methods,
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
    log: LogOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network by several methods in turn, and report.

    An interrupted comparison goes on where it stopped when it is started again with the same --out.

    Example: lowcal compare --methods sgd,local,freeze --set epochs=20
    """
    from lowcal import api

    changes = [*budget_settings(budget), *(settings or []), *(["deterministic=true"] * deterministic)]
    chosen = api.configured(recipe, changes)
    folder = out or free_folder(Path("runs") / chosen.name)
    more = [] if out else ["--out", str(folder)]
    with notes_apart(as_json), resumable(context, folder, more, chosen.checkpoint.grace):
        result = api.compare(
            chosen, methods, seeds, out=folder, data_dir=data_dir, device=device, log=log or (), quiet=quiet
        )
    if as_json:
        print_json({"report": str(result.report), **read_json(folder / "summary.json")})
    else:
        print(f"\n{result}")


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="A recipe's name or file [default: digits; or the resumed run's].",
            autocompletion=complete.recipes,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How to train [default: local; or the resumed run's].", autocompletion=complete.methods),
    ] = None,
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
    log: LogOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train one network by one method.

    Under torchrun each process takes its share of each mini-batch: torchrun --nproc-per-node N -m lowcal train ...

    Example: lowcal train --recipe resnet18-cifar10 --method local
    """
    from lowcal import api

    changes = [*budget_settings(budget), *(settings or []), *(["deterministic=true"] * deterministic)]
    with (
        notes_apart(as_json),
        api.planned(
            recipe, method, settings=changes, out=out, resume=resume, extend=extend, device=device, log=log or ()
        ) as training,
    ):
        more = ([] if resume else ["--resume"]) + ([] if out else ["--out", str(training.folder)])
        with resumable(context, training.folder, more, training.recipe.checkpoint.grace):
            result = training.run(data_dir=data_dir, quiet=quiet)
    if not training.group.is_main:
        return
    if as_json:
        print_json({"folder": str(training.folder), **read_json(training.folder / "summary.json")})
    else:
        print(result)


@app.command()
def layers(
    model: ModelOption,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images [default: 32; torchvision's: 224].")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes.")] = 10,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 3,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first stage.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that the schedule is worked out for.")] = 90,
    as_json: JsonOption = False,
) -> None:
    """List a network's layers in the order in which they run.

    Example: lowcal layers --model resnet18
    """
    from lowcal.console import layers_text
    from lowcal.experiments.describe import describe
    from lowcal.models import usual_size
    from lowcal.report.table import amount

    pixels = image_size or usual_size(model)
    network = describe(model, classes=classes, channels=channels, image_size=pixels, width=width, epochs=epochs)
    rows = [row.__dict__ for row in network.layers]
    if as_json:
        print_json(network.as_dict())
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
    as_json: JsonOption = False,
) -> None:
    """Make a table and an HTML page from run folders.

    Example: lowcal report runs/digits-sgd runs/digits-local --out report
    """
    from lowcal.console import report_text
    from lowcal.report.page import write_report

    made = write_report(runs, out)
    if as_json:
        print_json({"report": str(made.page), **made.summary})
    else:
        print(report_text(made))
