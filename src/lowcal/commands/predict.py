"""The command that applies a trained network: predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowcal.commands.common import DeviceOption, JsonOption, QuietOption, app, notes_apart
from lowcal.errors import LowcalError


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    weights: Annotated[
        Literal["last", "best"], typer.Option(help="Of the last epoch, or of that with the lowest test error.")
    ] = "last",
    csv: Annotated[Path | None, typer.Option(help="File for the table.")] = None,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Predict the classes of images with a trained run.

    Files that are no images are named, and the others predicted; the exit code is then 2.

    Example: lowcal predict runs/digits-local photos/
    """
    from lowcal.console import Display
    from lowcal.experiments.assemble import find_device
    from lowcal.experiments.predict import image_files
    from lowcal.experiments.predict import predict as run_on
    from lowcal.report.table import Column, Table

    if csv and (csv.suffix != ".csv" or not csv.parent.is_dir()):
        raise LowcalError(f"--csv {csv}: give a name that ends in .csv, in a folder that exists")
    files = image_files(images)
    with notes_apart(), Display(quiet=quiet) as display:
        rows, failures = run_on(
            run,
            files,
            best=weights == "best",
            device=find_device(device),
            watch=lambda done: display.stage("predicting", done, len(files)),
        )
    columns = (Column("file", "file"), Column("class", "class"), Column("probability", "probability", ".3f"))
    table = Table(columns, rows)
    if csv:
        table.write(csv.with_suffix(""), ["csv"])
    if as_json:
        print(table.json(run=str(run), weights=weights, unreadable=failures), end="")
    elif rows:
        print(table.text())
    if failures:
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise LowcalError(
            f"{len(failures)} of {len(files)} files cannot be read: {', '.join(failures[:3])}{more}; fix or remove them"
        )
