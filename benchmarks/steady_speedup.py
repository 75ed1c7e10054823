"""Speed-ups of runs that took turns, with bursts of other work on the machine taken out: `steady_speedup.py FOLDER`.

Other work comes in bursts of minutes, so that only epochs of one turn are compared: the time of each is
divided by the median time of plain SGD's epochs in its turn. A run's time is the sum over its epochs, each with the
median of these ratios over all epochs of its kind: of the same method at the same boundary, of all seeds.

Reads the run folders of a comparison in FOLDER, prints and writes FOLDER/steady.md.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import METHOD
from lowcal.report.table import Column, Table

Record = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Sequence[Record]]]  # name -> seed -> records of the epochs
PLAIN = "plain"  # the kind of epochs in which the whole network learns by SGD


def kind_of(method: str, record: Record) -> Hashable:
    """What the epoch of `record` did; epochs of one kind do the same work on average."""
    if method == "prune":
        return method, record["flops"]  # which channels are left
    if method != "stochastic-depth" and not record["boundary"]:
        return PLAIN
    return method, record["boundary"]


def steady_times(runs: Runs, kind: Callable[[str, Record], Hashable] = kind_of) -> dict[str, float]:
    """The time of each name's runs, on average over its seeds, in epochs of plain SGD."""
    plain: dict[tuple[int, int], list[float]] = defaultdict(list)  # by seed and turn
    for name, seed, record in _all(runs):
        if kind(name, record) == PLAIN:
            plain[seed, record["epoch"]].append(record["seconds"])
    ratios: dict[Hashable, list[float]] = defaultdict(list)
    for name, seed, record in _all(runs):
        if turn := plain.get((seed, record["epoch"])):
            ratios[kind(name, record)].append(record["seconds"] / statistics.median(turn))
    steady = {each: 1.0 if each == PLAIN else statistics.median(found) for each, found in ratios.items()}
    return {
        name: statistics.mean(sum(steady[kind(name, record)] for record in records) for records in seeds.values())
        for name, seeds in runs.items()
    }


def _all(runs: Runs) -> list[tuple[str, int, Record]]:
    return [
        (name, seed, record) for name, seeds in runs.items() for seed, records in seeds.items() for record in records
    ]


def main(folder: Path) -> None:
    """Writes the table."""
    runs: dict[str, dict[int, list[Record]]] = defaultdict(dict)
    for log in sorted(folder.glob("*-seed*/epochs.jsonl")):
        method, _, seed = log.parent.name.rpartition("-seed")
        runs[method][int(seed)] = [json.loads(line) for line in log.read_text().splitlines()]
    times = steady_times(runs)
    flops = {method: sum(e["flops"] for run in seeds.values() for e in run) for method, seeds in runs.items()}
    rows = [
        {"method": method, "speedup": times["sgd"] / times[method], "flops": flops[method] / flops["sgd"]}
        for method in sorted(times, key=times.__getitem__, reverse=True)
    ]
    columns = (METHOD, Column("speedup", "steady speed-up", ".2f", "×"), Column("flops", "FLOPs", ".2f", "×"))
    table = Table(columns, rows)
    table.write(folder / "steady", ("md",))
    print(table.markdown())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
