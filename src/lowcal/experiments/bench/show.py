"""What `lowcal bench` prints and draws from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowcal.files import memory
from lowcal.report.table import Column, Table, amount

MOST_LAYERS = 10  # whose times are printed; the JSON has all of them


def bench_text(result: Mapping[str, Any]) -> str:
    """Return the tables of a bench's JSON, at most 80 columns wide."""
    tables = [_steps(result), _parts(result), _predictions(result)]
    if result["layer_times"]:
        tables.append(_layers(result))
    return "\n\n".join(tables)


def _steps(result: Mapping[str, Any]) -> str:
    columns = (
        Column("method", "method"),
        Column("boundary", "boundary", ".0f", f"/{result['layers']}"),
        Column("step_ms", "step ms", ".4g"),
        Column("", "quartiles", lambda row: f"{row['step_ms_q25']:.4g}-{row['step_ms_q75']:.4g}"),
        Column("speedup", "speed-up", ".2f", "×"),
        Column("ideal", "ideal", ".2f", "×"),
        Column("efficiency", "effic.", ".3f"),
        Column("", "memory", lambda row: memory(row["peak_memory_bytes"]).replace(" ", "")),
        Column("", "FLOPs", lambda row: amount(row["flops"]).replace(" ", "")),
    )
    loops = f"plain loop: {_loop(result, 'plain_step_ms')}"
    if result["compiled_step_ms"]:
        loops += f"\nplain loop, torch.compile {result['compile_mode']}: {_loop(result, 'compiled_step_ms')}"
    return (
        f"{Table(columns, result['rows']).text()}\n{loops}\nmedians of {result['settings']['rounds']} samples in turn"
    )


def _loop(result: Mapping[str, Any], name: str) -> str:
    return f"{result[name]:.4g} ms ({result[f'{name}_q25']:.4g}-{result[f'{name}_q75']:.4g})"


def _parts(result: Mapping[str, Any]) -> str:
    columns = (
        Column("boundary", "boundary", ".0f", f"/{result['layers']}"),
        *(Column(name, f"{name} ms", ".4g") for name in ("prefix", "suffix", "products")),
        Column("move", "move ms", ".2g"),
    )
    rows = [
        {"boundary": boundary, "move": result["moves_ms"][boundary], **parts}
        for boundary, parts in result["parts_ms"].items()
    ]
    return Table(columns, rows).text()


def _predictions(result: Mapping[str, Any]) -> str:
    columns = (
        Column("schedule", "whole run under"),
        Column("epochs", "epochs", "number"),
        Column("mean_boundary", "mean boundary", ".1f", f"/{result['layers']}"),
        Column("method", "method"),
        Column("speedup", "speed-up", ".2f", "×"),
    )
    return Table(columns, result["predictions"]).text()


def _layers(result: Mapping[str, Any]) -> str:
    columns = (
        Column("layer", "layer (slowest first)"),
        Column("local_ms", "local ms", ".4g"),
        Column("backward_ms", "backward ms", ".4g"),
        Column("ratio", "ratio", ".2f", "×"),
    )
    times = result["layer_times"]
    slowest = sorted(times, key=lambda time: time["local_ms"], reverse=True)[:MOST_LAYERS]
    local, backward = (sum(time[key] for time in times) for key in ("local_ms", "backward_ms"))
    total = {"layer": f"all {len(times)} layers", "local_ms": local, "backward_ms": backward, "ratio": backward / local}
    return Table(columns, [*slowest, total]).text()


def targets_text(result: Mapping[str, Any], targets: Mapping[str, float]) -> str:
    """Return the measured figures beside the targets of docs/performance.md.

    Args:
        targets: by name; "efficiency" and "speed-up / ideal" are lower limits, the others are upper limits. A figure
            without a target is left out, except "speed-up / ideal", whose target is always 1.
    """
    wanted = {"speed-up / ideal": 1.0, **targets}
    rows = []
    for name, where, value in sorted(_targeted(result), key=lambda figure: figure[0]):
        if name in wanted:
            is_lower_limit = name in ("efficiency", "speed-up / ideal")
            is_met = value >= wanted[name] if is_lower_limit else value <= wanted[name]
            target = f"{'>=' if is_lower_limit else '<='} {wanted[name]:.2f}"
            verdict = "met" if is_met else "missed"
            rows.append({"figure": name, "where": where, "measured": value, "target": target, "verdict": verdict})
    columns = (
        Column("figure", "figure"),
        Column("where", "where"),
        Column("measured", "measured", ".3f"),
        Column("target", "target", lambda row: row["target"]),
        Column("verdict", ""),
    )
    return Table(columns, rows).text()


def _targeted(result: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return the name, the place and the value of each figure that may have a target."""
    rows = {(row["method"], row["boundary"]): row for row in result["rows"]}
    boundaries = sorted({boundary for _, boundary in rows} - {0})
    sgd, last = rows["sgd", 0], boundaries[-1]
    found = [
        ("boundary 0 / plain", "", rows["local", 0]["step_ms"] / result["plain_step_ms"]),
        ("sgd / plain", "", sgd["step_ms"] / result["plain_step_ms"]),
        ("memory", f"at {last}", rows["local", last]["peak_memory_bytes"] / sgd["peak_memory_bytes"]),
    ]
    if result["compiled_step_ms"]:
        found.append(("sgd / compiled loop", "", sgd["step_ms"] / result["compiled_step_ms"]))
    every = next((name for name, _ in rows if name.startswith("local/")), None)
    for boundary in boundaries:
        for method in ("local", "freeze"):
            row = rows[method, boundary]
            found.append(("efficiency", f"{method} at {boundary}", row["efficiency"]))
            found.append(("speed-up / ideal", f"{method} at {boundary}", row["speedup"] / row["ideal"]))
        if every:
            ratio = rows[every, boundary]["step_ms"] / rows["freeze", boundary]["step_ms"]
            found.append((f"every {every.removeprefix('local/')} / freeze", f"at {boundary}", ratio))
        move_ms = result["moves_ms"][boundary]
        found.append(("move / step", f"to {boundary}", move_ms / rows["local", boundary]["step_ms"]))
        found.append(("move, seconds", f"to {boundary}", move_ms / 1000.0))
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw step time against boundary, beside the limit and the FLOP ideal, to `path`: an .svg or .png."""
    from matplotlib.figure import Figure  # takes a second, which the tables do not need

    from lowcal.report.figures import INK, colours, save, style

    rows, sgd = result["rows"], result["rows"][0]
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if "/" not in name and name != "sgd"]
    with style():
        figure = Figure()
        axes = figure.add_subplot()
        figure.suptitle("Time of a training step, ms", x=0.015, ha="left", fontsize=14, fontweight="bold")
        axes.axhline(result["plain_step_ms"], color=INK, linewidth=1, label="plain loop")
        if result["compiled_step_ms"]:
            axes.axhline(
                result["compiled_step_ms"], color=INK, linewidth=1, linestyle="-.", label="plain loop, compiled"
            )
        for method, (colour, _dark) in colours(methods).items():
            chosen = [row for row in rows if row["method"] == method or row is sgd]
            chosen.sort(key=lambda row: row["boundary"])
            at, middle = [row["boundary"] for row in chosen], [row["step_ms"] for row in chosen]
            below = [row["step_ms"] - row["step_ms_q25"] for row in chosen]
            above = [row["step_ms_q75"] - row["step_ms"] for row in chosen]
            axes.errorbar(at, middle, [below, above], color=colour, marker="o", markersize=4, capsize=3, label=method)
            limits = [row["limit_ms"] for row in chosen]
            axes.plot(at, limits, color=colour, linestyle="--", linewidth=1.2, label="its limit")
            ideals = [sgd["step_ms"] / row["ideal"] for row in chosen]
            axes.plot(at, ideals, color=colour, linestyle=":", linewidth=1.2, label="its FLOP ideal")
        axes.set_ylim(0, None)
        axes.set_xlabel(f"boundary, of {result['layers']} layers of {result['model']}")
        axes.legend(fontsize=9)
    save(figure, path)
