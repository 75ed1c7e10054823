"""Speed-ups of a comparison with bursts of other work on the machine taken out: `steady_speedup.py FOLDER`.

Each epoch's step time is replaced by the median over all epochs of the method, of all seeds, at the same boundary.
Reads the run folders in FOLDER, prints and writes FOLDER/steady.md.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def steady_step_ms(runs: list[list[dict]]) -> float:
    """Mean over the runs of the sum of their epochs' steady step times, in ms times epochs."""
    at: dict[int, list[float]] = defaultdict(list)
    for epoch in (epoch for run in runs for epoch in run):
        at[epoch["boundary"]].append(epoch["step_ms"])
    steady = {boundary: statistics.median(times) for boundary, times in at.items()}
    return statistics.mean(sum(steady[epoch["boundary"]] for epoch in run) for run in runs)


def main(folder: Path) -> None:
    """Writes the table."""
    methods: dict[str, list[list[dict]]] = defaultdict(list)
    for log in sorted(folder.glob("*-seed*/epochs.jsonl")):
        methods[log.parent.name.rpartition("-seed")[0]].append(
            [json.loads(line) for line in log.read_text().splitlines()]
        )
    times = {method: steady_step_ms(runs) for method, runs in methods.items()}
    flops = {method: sum(epoch["flops"] for run in runs for epoch in run) for method, runs in methods.items()}
    rows = [
        f"| {method} | {times['sgd'] / times[method]:.2f}× | {flops[method] / flops['sgd']:.2f}× |"
        for method in sorted(times, key=times.__getitem__, reverse=True)
    ]
    lines = ["| method | steady speed-up | FLOPs |", "| --- | ---: | ---: |", *rows]
    table = "\n".join(lines)
    (folder / "steady.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
