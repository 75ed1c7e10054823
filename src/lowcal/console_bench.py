"""What `lowcal bench` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowcal.console import amount, table
from lowcal.report.tables import memory

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
