"""Markdown tables of `lowcal bench` results: `bench_table.py FILE.json...` writes FILE.md beside each."""

import json
import sys
from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """One row for each method and boundary; times are medians with quartiles."""
    lines = [
        "| method | boundary | step, ms (quartiles) | speed-up | FLOP ideal | efficiency | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    whole = next(row["peak_memory_bytes"] for row in result["rows"] if row["method"] == "sgd")
    for row in result["rows"]:
        step = f"{time(row['step_ms'])} ({time(row['step_ms_q25'])} to {time(row['step_ms_q75'])})"
        ratios = f"{row['speedup']:.2f}× | {row['ideal']:.2f}× | {row['efficiency']:.3f}"
        memory = f"{row['peak_memory_bytes'] / whole:.2f}"
        lines.append(f"| {row['method']} | {row['boundary']} of {result['layers']} | {step} | {ratios} | {memory} |")
    return "\n".join(lines) + "\n"


def time(milliseconds: float) -> str:
    """Whole milliseconds, or three digits if there are fewer."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).with_suffix(".md").write_text(table(json.loads(Path(name).read_text())))
