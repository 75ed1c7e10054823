"""The commands that measure: bench, reproduce, sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowcal.commands.common import (
    DataDirOption,
    DeviceOption,
    JsonOption,
    MethodOption,
    ModelOption,
    QuietOption,
    RecipeOption,
    SetOption,
    app,
    notes_apart,
    print_json,
    resumable,
)
from lowcal.errors import LowcalError
from lowcal.files import free_folder


@app.command()
def bench(
    model: ModelOption,
    batch: Annotated[int, typer.Option(help="Images in a mini-batch.")] = 64,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images [default: 32; torchvision's: 224].")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes.")] = 10,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first stage.")] = None,
    boundaries: Annotated[
        str, typer.Option(help="Boundaries as fractions of the layers, separated by commas.")
    ] = "0,0.25,0.5,0.75",
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp16.")] = "float32",
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", help="TF32 in float32 products [default: in convolutions alone].")
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--channels-first", help="Memory format [default: the one with faster steps]."),
    ] = None,
    step: Annotated[
        str, typer.Option(help="How a step runs: eager, compiled, graphed, graphed-compiled, graphed-overlapped.")
    ] = "eager",
    every: Annotated[int, typer.Option(help="Also with local updates in every n-th step; 1: not.")] = 4,
    epochs: Annotated[int, typer.Option(help="Of the whole run that is predicted.")] = 90,
    rounds: Annotated[int, typer.Option(help="Samples of each time.")] = 20,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Time the plain loop under torch.compile too [default: on a GPU]."),
    ] = None,
    layer_times: Annotated[bool, typer.Option("--layer-times/--no-layer-times", help="Time each layer.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the picture, .svg or .png.")] = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Measure a training step at each boundary.

    It is shown with a plain loop and the limit, the least time that the step can take.

    Example: lowcal bench --model resnet50 --batch 32
    """
    from lowcal.experiments.assemble import find_device
    from lowcal.experiments.bench.run import bench as run
    from lowcal.experiments.bench.setup import BenchSettings, parse_boundaries
    from lowcal.experiments.bench.show import bench_text
    from lowcal.experiments.bench.show import plot as draw
    from lowcal.files import atomic_write
    from lowcal.models import usual_size

    for file in (json_file, plot):  # found now, not after minutes of measuring
        if file and not file.parent.is_dir():
            raise LowcalError(f"{file}: there is no folder {file.parent}; make it or name another file")
    if plot and plot.suffix not in (".svg", ".png"):
        raise LowcalError(f"--plot {plot}: give a name that ends in .svg or .png")
    settings = BenchSettings(
        model=model,
        batch=batch,
        image_size=image_size or usual_size(model),
        classes=classes,
        width=width,
        boundaries=parse_boundaries(boundaries),
        precision=precision,
        tf32=tf32,
        channels_last=channels_last,
        step=step,
        every=every,
        epochs=epochs,
        rounds=rounds,
        layers=layer_times,
        compile=compiled,
    )
    result = run(settings, find_device(device), (lambda text: None) if quiet else print)
    print(bench_text(result))
    if json_file:
        atomic_write(json_file, (json.dumps(result, indent=1) + "\n").encode())
    if plot:
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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a table or figure of the paper, published next to measured.

    Runs that are in the folder already are not trained again; interrupted ones go on where they stopped.

    Example: lowcal reproduce table1 --scale tiny
    """
    from lowcal.console import Display
    from lowcal.experiments.assemble import find_device
    from lowcal.experiments.reproduce.results import Results
    from lowcal.experiments.reproduce.run import dry_run, plan_text
    from lowcal.experiments.reproduce.run import reproduce as run

    results = Results(out, scale, settings=settings or [], data_dir=data_dir)
    where = find_device(device)
    if dry:
        plan, entries = dry_run(name, results, seeds=seeds, cells=cells, device=where)
        if as_json:
            print_json({"title": plan.title, "runs": [entry._asdict() for entry in entries]})
        else:
            print(plan_text(plan, entries))
        return
    with notes_apart(as_json), resumable(context, out, []), Display(quiet=quiet) as display:
        table, files = run(name, results, seeds=seeds, cells=cells, device=where, watcher=display)
    if as_json:
        print(table.json(title=table.title, files=[str(file) for file in files]), end="")
        return
    print(f"\n{table.text()}\n")
    print(f"written: {', '.join(map(str, files))}")


@app.command()
def sweep(
    context: typer.Context,
    search: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=...", help="Setting to search: low:high, low:high:log or a,b,c; can be repeated."),
    ] = None,
    recipe: RecipeOption = "digits",
    method: MethodOption = "local",
    trials: Annotated[int | None, typer.Option(help="Trials, over all workers [a grid: all combinations].")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each trial, whose mean counts.")] = 1,
    objective: Annotated[
        str, typer.Option(help="What to minimise: top1_error, best_top1_error, seconds, flops; or several, by commas.")
    ] = "top1_error",
    sampler: Annotated[str, typer.Option(help="How to choose settings: tpe, random or grid.")] = "tpe",
    storage: Annotated[str | None, typer.Option(help="URL of a database [default: SQLite in the folder].")] = None,
    study: Annotated[str | None, typer.Option(help="Name in the database [default: RECIPE-METHOD].")] = None,
    lease: Annotated[
        float, typer.Option(help="Seconds without a heartbeat after which another worker takes a trial up.")
    ] = 60.0,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and results [default: runs/sweep-RECIPE-METHOD, or -2 ...].")
    ] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search the settings of a method by many trials.

    Each is evaluated on held-out training images.

    The same command with the same --out, here or on another machine, adds a worker or goes on.

    Example: lowcal sweep --search local.lr=1e-3:1e-1:log --trials 20
    """
    from lowcal.console import Display
    from lowcal.experiments.recipe_text import as_dict, load_recipe
    from lowcal.experiments.sweep import Sweep
    from lowcal.experiments.sweep import sweep as run
    from lowcal.report.headline import title
    from lowcal.report.sweep import sweep_text

    plan = Sweep(
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
    folder = out or free_folder(Path("runs") / f"sweep-{plan.recipe.name}-{method}")
    more = [] if out else ["--out", str(folder)]
    grace = plan.recipe.checkpoint.grace
    with notes_apart(as_json), resumable(context, folder, more, grace), Display(quiet=quiet) as display:
        display.note(f"{title(as_dict(plan.recipe))}: {method}, {plan.trials} trials; in {folder}")
        from lowcal.experiments.assemble import find_device

        result = run(plan, folder, data_dir=data_dir, device=find_device(device), watcher=display)
    if as_json:
        print_json({**result.summary, "files": [str(file) for file in result.files]})
        return
    print(f"\n{sweep_text(result.summary)}\n")
    print(f"results: {', '.join(str(file) for file in result.files)}")
