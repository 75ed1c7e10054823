"""What `lowcal bench` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowcal.console import table
from lowcal.report.table import amount, memory

MOST_LAYERS = 10  # whose times are printed; all of them are in the JSON


def bench_text(result: Mapping[str, Any]) -> str:
    """The tables of a bench's JSON, at most 80 columns."""
    return "\n\n".join(
        [_steps(result), _parts(result), _predictions(result)] + ([_layers(result)] if result["layer_times"] else [])
    )


def _steps(result: Mapping[str, Any]) -> str:
    plain = result["plain_step_ms"]
    lines = table(
        ("method", "boundary", "step ms", "quartiles", "speed-up", "ideal", "effic.", "memory", "FLOPs"),
        [
            (
                row["method"],
                f"{row['boundary']}/{result['layers']}",
                f"{row['step_ms']:.4g}",
                f"{row['step_ms_q25']:.4g}-{row['step_ms_q75']:.4g}",
                f"{row['speedup']:.2f}x",
                f"{row['ideal']:.2f}x",
                f"{row['efficiency']:.3f}",
                memory(row["peak_memory_bytes"]).replace(" ", ""),
                amount(row["flops"]).replace(" ", ""),
            )
            for row in result["rows"]
        ],
        left=(0,),
    )
    settings = result["settings"]
    note = (
        f"plain loop: {plain:.4g} ms ({result['plain_step_ms_q25']:.4g}-{result['plain_step_ms_q75']:.4g}); "
        f"medians of {settings['rounds']} samples in turn"
    )
    return f"{lines}\n{note}"


def _parts(result: Mapping[str, Any]) -> str:
    return table(
        ("boundary", "prefix ms", "suffix ms", "products ms", "move ms"),
        [
            (
                f"{boundary}/{result['layers']}",
                *(f"{parts[name]:.4g}" for name in ("prefix", "suffix", "products")),
                f"{result['moves_ms'][boundary]:.2g}",
            )
            for boundary, parts in result["parts_ms"].items()
        ],
        left=(),
    )


def _predictions(result: Mapping[str, Any]) -> str:
    return table(
        ("whole run under", "epochs", "mean boundary", "method", "speed-up"),
        [
            (
                row["schedule"],
                str(row["epochs"]),
                f"{row['mean_boundary']:.1f}/{result['layers']}",
                row["method"],
                f"{row['speedup']:.2f}x",
            )
            for row in result["predictions"]
        ],
        left=(0, 3),
    )


def _layers(result: Mapping[str, Any]) -> str:
    times = result["layer_times"]
    local, backward = (sum(time[key] for time in times) for key in ("local_ms", "backward_ms"))
    slowest = sorted(times, key=lambda time: time["local_ms"], reverse=True)[:MOST_LAYERS]
    rows = [
        (time["layer"], f"{time['local_ms']:.3g}", f"{time['backward_ms']:.3g}", f"{time['ratio']:.2f}x")
        for time in slowest
    ]
    total = (f"all {len(times)} layers", f"{local:.4g}", f"{backward:.4g}", f"{backward / local:.2f}x")
    return table(("layer (slowest first)", "local ms", "backward ms", "ratio"), [*rows, total], left=(0,))


def targets_text(result: Mapping[str, Any], targets: Mapping[str, float]) -> str:
    """The figures that docs/performance.md sets targets for, beside the targets.

    Args:
        targets: by name; "efficiency" and "speed-up / ideal" are the least, the others are the most that is wanted.
            What has no target is left out, but for "speed-up / ideal", which is always to be 1.
    """
    rows = {(row["method"], row["boundary"]): row for row in result["rows"]}
    boundaries = sorted({boundary for _, boundary in rows} - {0})
    sgd, last = rows["sgd", 0], boundaries[-1]
    found = [
        ("boundary 0 / plain", "", rows["local", 0]["step_ms"] / result["plain_step_ms"]),
        ("sgd / plain", "", sgd["step_ms"] / result["plain_step_ms"]),
        ("memory", f"at {last}", rows["local", last]["peak_memory_bytes"] / sgd["peak_memory_bytes"]),
    ]
    for boundary in boundaries:
        freeze = rows["freeze", boundary]
        for method in ("local", "freeze"):
            row = rows[method, boundary]
            found.append(("efficiency", f"{method} at {boundary}", row["efficiency"]))
            found.append(("speed-up / ideal", f"{method} at {boundary}", row["speedup"] / row["ideal"]))
        every = next((name for name, _ in rows if name.startswith("local/")), None)
        if every:
            ratio = rows[every, boundary]["step_ms"] / freeze["step_ms"]
            found.append((f"every {every.removeprefix('local/')} / freeze", f"at {boundary}", ratio))
        move_ms = result["moves_ms"][boundary]
        found.append(("move / step", f"to {boundary}", move_ms / rows["local", boundary]["step_ms"]))
        found.append(("move, seconds", f"to {boundary}", move_ms / 1000.0))
    least = ("efficiency", "speed-up / ideal")
    wanted = {"speed-up / ideal": 1.0, **targets}
    lines = []
    for name, where, value in sorted((line for line in found if line[0] in wanted), key=lambda line: line[0]):
        is_met = value >= wanted[name] if name in least else value <= wanted[name]
        sign = ">=" if name in least else "<="
        lines.append((name, where, f"{value:.3f}", f"{sign} {wanted[name]:.2f}", "met" if is_met else "missed"))
    return table(("figure", "where", "measured", "target", ""), lines, left=(0, 1, 4))
