"""Measure training steps: each boundary of a network, the kinds of step, and the memory formats.

Variants of a step are timed in turn in one process. `performance.py` runs these measurements.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from common import BOUNDARY, METHOD, STEP, digits, write
from lowcal.experiments.backends import kernels
from lowcal.experiments.bench.run import bench
from lowcal.experiments.bench.setup import BenchSettings, BenchSetup, TimedMethod
from lowcal.experiments.bench.show import bench_text, plot, targets_text
from lowcal.experiments.bench.timing import Timing, Work, time_in_turn
from lowcal.report.table import Column, Table
from lowcal.steps.modes import STEPS as STEP_KINDS
from lowcal.steps.step import now
from lowcal.training.environment import gather_environment

FORMAT_ROUNDS = 7
FORMATS = {"first": False, "last": True}  # where the channels are

STEPS = (
    METHOD,
    BOUNDARY,
    STEP,
    Column("speedup", "speed-up", ".2f", "×"),
    Column("ideal", "FLOP ideal", ".2f", "×"),
    Column("efficiency", "efficiency", ".3f"),
    Column("memory", "memory", ".2f"),
)


def write_steps(stem: Path, settings: BenchSettings, device: torch.device, targets: Mapping[str, float]) -> None:
    """Measure one network at each boundary, print the figures beside the targets, write STEM.json, .md and .svg."""
    result = bench(settings, device, print)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    whole = next(row["peak_memory_bytes"] for row in result["rows"] if row["method"] == "sgd")
    rows = [{**row, "layers": result["layers"], "memory": row["peak_memory_bytes"] / whole} for row in result["rows"]]
    Table(STEPS, rows).write(stem, ("md",))
    plot(result, stem.with_name(f"{stem.name}.svg"))
    print(bench_text(result), targets_text(result, targets), sep="\n\n")


def write_kinds(stem: Path, settings: BenchSettings, names: Sequence[str], device: torch.device) -> None:
    """Time the steps of sgd, local and freeze in each kind, in turn, next to the plain loop."""
    *_, facts = kinds(replace(settings, boundaries=(0.5,), every=1), names, device)
    columns = (
        Column("step", "step"),
        METHOD,
        BOUNDARY,
        STEP,
        Column("plain_over_step", "plain loop / step", ".3f", "×"),
        Column("ready_s", "seconds until it runs", lambda row: f"{max(row['ready_s'], 0.0):.2f}"),
    )
    write(stem, Table(columns, facts.pop("rows")), **facts)


def kinds(settings: BenchSettings, names: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the methods of `settings` in each kind of step, and the plain loop, in turn.

    Args:
        names: kinds of step, and modes of torch.compile for the network of a plain loop.

    Yields:
        The figures, once more after each kind and mode, since compiling may take longer than there is time. `ready_s`
        of a row is the time until a step runs at full speed, at the start and after a move, with compiling (from an
        empty cache) and recording.
    """
    with (
        TemporaryDirectory() as cache,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        kernels(tf32=settings.tf32),
    ):
        setups = {name: BenchSetup(replace(settings, step=name), device) for name in names if name in STEP_KINDS}
        plain = next(iter(setups.values()))
        works, rows = {"plain": Work(plain.plain_step())}, []
        for name in names:
            start = now(device)
            if name in setups:
                for label, timed in setups[name].methods().items():
                    works[f"{name} {label}"] = timed.work()
                    place = {"step": name, **_place(timed), "ready_s": timed.move_ms / 1000.0}
                    rows.append((f"{name} {label}", place))
            else:
                works[name] = Work(plain.compiled_plain_step(name))
                place = {"step": f"torch.compile, {name}", "method": "plain loop", "boundary": 0}
                rows.append((name, {**place, "layers": len(plain.order.layers), "ready_s": now(device) - start}))
            yield _kinds_so_far(works, rows, plain.settings, device)


def _kinds_so_far(
    works: Mapping[str, Work],
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    settings: BenchSettings,
    device: torch.device,
) -> dict[str, Any]:
    times = time_in_turn(works, rounds=settings.rounds, warm_up=settings.warm_up, runs=settings.runs, device=device)
    plain = times["plain"].median
    return {
        "layers": rows[0][1]["layers"],
        "plain_step_ms": plain,
        "settings": asdict(settings),
        "environment": gather_environment(str(device)),
        "rows": [
            {**row, **times[name].fields("step_ms"), "plain_over_step": plain / times[name].median}
            for name, row in rows
        ],
    }


def write_formats(stem: Path, networks: Mapping[str, BenchSettings], device: torch.device) -> None:
    """Time the steps of sgd, local and freeze with the channels first and last in memory, in turn."""
    rows = [row for name, settings in networks.items() for row in _format_rows(name, settings, device)]
    columns = (
        Column("network", "network"),
        METHOD,
        BOUNDARY,
        *(
            Column(place, f"{heading}, ms (quartiles)", lambda row, place=place: _timing(row[place]))
            for place, heading in (("first", "channels first"), ("last", "last"))
        ),
        Column("first_over_last", "first / last", ".2f"),
    )
    write(stem, Table(columns, rows), environment=gather_environment(str(device)))


def _format_rows(name: str, settings: BenchSettings, device: torch.device) -> list[dict[str, Any]]:
    settings = replace(settings, boundaries=(0.5,), every=1)
    variants = {key: replace(settings, channels_last=last) for key, last in FORMATS.items()}
    methods, times = _in_turn(variants, FORMAT_ROUNDS, device)
    return [
        {
            "network": name,
            **_place(timed),
            **{place: asdict(times[f"{place} {label}"]) for place in FORMATS},
            "first_over_last": times[f"first {label}"].median / times[f"last {label}"].median,
        }
        for (key, label), timed in methods.items()
        if key == "first"
    ]


def _in_turn(
    variants: Mapping[str, BenchSettings], rounds: int, device: torch.device
) -> tuple[dict[tuple[str, str], TimedMethod], dict[str, Timing]]:
    """Time the methods of each variant and the plain loop of the first one, all in turn."""
    first = next(iter(variants.values()))
    with kernels(tf32=first.tf32):
        setups = {key: BenchSetup(settings, device) for key, settings in variants.items()}
        methods = {(key, name): timed for key, setup in setups.items() for name, timed in setup.methods().items()}
        works = {f"{key} {name}": timed.work() for (key, name), timed in methods.items()}
        works["plain"] = Work(next(iter(setups.values())).plain_step())
        times = time_in_turn(works, rounds=rounds, warm_up=first.warm_up, runs=first.runs, device=device)
    return methods, times


def _place(timed: TimedMethod) -> dict[str, Any]:
    return {"method": timed.label, "boundary": timed.method.boundary, "layers": len(timed.method.layers)}


def _timing(timing: Mapping[str, float]) -> str:
    return f"{digits(timing['median'])} ({digits(timing['q25'])} to {digits(timing['q75'])})"
