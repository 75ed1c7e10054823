"""Tables, tests and figures of what benchmarks/finetuning.py measured."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from scipy.stats import ttest_1samp, ttest_rel  # type: ignore[import-untyped]  # comes with scikit-learn

from lowcal.report.figures import INK, save, style
from lowcal.report.runs import SAME_TIME
from lowcal.report.table import Column, Table

ALL = "all layers"
TITLES = {
    "efficientnet": "EfficientNet-Lite0, {images} images of CIFAR-10 at {size}x{size}",
    "vit": "A small ViT, {images} images of five other classes",
}
_COLOURS = ("#0072b2", "#d55e00", "#b8860b", "#00805d", "#a8487f", "#6a3fb5", "#7a6a00", "#8c2d2d")
_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
Arm = tuple[str, int]


def arms_of(rows: Sequence[Mapping[str, Any]]) -> dict[Arm, dict[str, Any]]:
    """A row for each family and length, over its seeds, which are in the same order in all."""
    groups: dict[Arm, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        groups.setdefault((row["family"], row["epochs"]), []).append(row)
    found = {}
    for arm, group in groups.items():
        row = {key: group[0][key] for key in ("family", "epochs", "optimizer", "lr", "head")}
        row["seeds"] = len(group)
        for key in ("accuracy", "seconds", "cpu_seconds"):
            values = [one[key] for one in group]
            row |= {key: mean(values), f"{key}_std": stdev(values), f"{key}_all": values}
        found[arm] = row
    return found


def compare(arms: dict[Arm, dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row how it differs from the best length of all layers, and from all layers in the same time.

    The best length is that with the highest mean accuracy. The same time is that of the shortest length that takes as
    long, a few percent less included, or the longest one. `p` are two-sided, of paired t-tests over seeds: of
    accuracies, and of the logarithm of times against the best length's divided by 2 and by 4. Times are those of the
    processor: with one thread they are the seconds of an idle machine. `wall_speedup` has the ratio of wall times.
    """
    whole = [row for row in arms.values() if row["family"] == ALL]
    target = max(whole, key=lambda row: row["accuracy"])
    for row in arms.values():
        for name, time in (("wall_speedup", "seconds"), ("speedup", "cpu_seconds")):
            ratios = [a / b for a, b in zip(target[f"{time}_all"], row[f"{time}_all"], strict=True)]
            row |= {name: mean(ratios), f"{name}_std": stdev(ratios)}
        if row["family"] == ALL:
            continue
        for factor in (2, 4):
            row[f"p_{factor}"] = float(ttest_1samp([math.log(ratio) for ratio in ratios], math.log(factor)).pvalue)
        enough = [other for other in whole if other["cpu_seconds"] >= SAME_TIME * row["cpu_seconds"]]
        rival = min(enough, key=lambda other: other["cpu_seconds"]) if enough else target
        for name, other in (("best", target), ("rival", rival)):
            row[name] = other["epochs"]
            row[f"{name}_gain"] = row["accuracy"] - other["accuracy"]
            row[f"{name}_p"] = float(ttest_rel(row["accuracy_all"], other["accuracy_all"]).pvalue)
    return list(arms.values())


def reaching(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For each part of the network, the run with the least time that is as accurate as the best one of all layers."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["cpu_seconds"]):
        if row["family"] != ALL and row["best_gain"] >= 0:
            found[row["family"]] = row
    return list(found.values())


def rate(row: Mapping[str, Any]) -> str:
    """The optimizer and its rate, as text."""
    head = f", head {row['lr'] * row['head']:g}" if row["head"] != 1 else ""
    return f"{_OPTIMIZERS[row['optimizer']]} {row['lr']:g}{head}"


def gain(name: str, row: Mapping[str, Any]) -> str:
    """The difference of accuracies in points, with its p."""
    if name not in row:
        return "–"
    return f"{row[f'{name}_gain']:+.1f} (p = {row[f'{name}_p']:.2g})"


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table."""
    best = max((row for row in rows if row["family"] == ALL), key=lambda row: row["accuracy"])["epochs"]
    return Table(
        (
            Column("family", "trained"),
            Column("epochs", "epochs", "number"),
            Column("lr", "rate", rate, left=True),
            Column("accuracy", "accuracy, %", ".1f"),
            Column("cpu_seconds", "time", ".1f", " s"),
            Column("speedup", f"all layers, {best} epochs, take", ".2f", "×"),
            Column("best_gain", "points against them", lambda row: gain("best", row)),
            Column("rival_gain", "points against all layers in the same time", lambda row: gain("rival", row)),
        ),
        rows,
    )


def figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Error against time: a line for each family over its lengths; all layers are dashed."""
    with style():
        drawn = Figure(figsize=(7.2, 4.8))
        axes = drawn.add_subplot()
        families = dict.fromkeys(row["family"] for row in rows)
        for name, colour in zip(families, (INK, *_COLOURS), strict=False):
            points = sorted((row["cpu_seconds"], 100 - row["accuracy"]) for row in rows if row["family"] == name)
            dash = (0, (5, 2)) if name == ALL else "-"
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker="o", linewidth=1.5, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("training time, s")
        axes.set_ylabel("top-1 error, %")
        axes.set_title(title, loc="left", fontsize=12)
        axes.legend(fontsize=9)
    return drawn


def write_all(folder: Path, pictures: Path) -> None:
    """Writes NETWORK.md, NETWORK-summary.json and the picture of each network that was measured."""
    for name, title in TITLES.items():
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        rows = compare(arms_of(content.pop("rows")))
        print(table(rows).markdown())
        table(rows).write(folder / name, ("md",))
        facts = {**content, "reaching": [[row["family"], row["epochs"]] for row in reaching(rows)]}
        Table((), rows).write(folder / f"{name}-summary", ("json",), **facts)
        save(figure(rows, title.format(**content)), pictures / f"finetune-{name}.png")
        for row in reaching(rows):
            print(
                f"{row['family']}, {row['epochs']} epochs: {row['speedup']:.2f} times less time; "
                f"p against 2: {row['p_2']:.2g}, against 4: {row['p_4']:.2g}; {gain('best', row)}"
            )
