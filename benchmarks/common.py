"""What the scripts share: arguments, progress lines, columns, and writing results as JSON and Markdown."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowcal.report.table import Column, Table

RESULTS = Path(__file__).parents[1] / "results"
METHOD = Column("method", "method")
BOUNDARY = Column("boundary", "boundary", lambda row: f"{row['boundary']} of {row['layers']}")
STEP = Column("step_ms", "step, ms (quartiles)", lambda row: quartiles(row))


def script(doc: str | None, **out: Any) -> argparse.ArgumentParser:
    """Return a parser with the script's docstring as its help and the option --out; `out` changes that option."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the files", **(out or {"required": True}))
    return parser


def write(stem: Path, table: Table, *, rows: Sequence[Mapping[str, Any]] | None = None, **facts: Any) -> None:
    """Print the table, and write STEM.md, and STEM.json with `facts` and the rows; `rows` replace the table's."""
    print(table.markdown())
    table.write(stem, ("md",))
    Table((), table.rows if rows is None else rows).write(stem, ("json",), **facts)


def quartiles(row: Mapping[str, Any], name: str = "step_ms") -> str:
    """Return a median with its quartiles, which are in the fields NAME, NAME_q25 and NAME_q75."""
    return f"{digits(row[name])} ({digits(row[f'{name}_q25'])} to {digits(row[f'{name}_q75'])})"


def digits(milliseconds: float) -> str:
    """Return whole milliseconds, or three digits if there are fewer."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


class Log:
    """A watcher of training that prints one line per epoch."""

    def note(self, text: str) -> None:
        """Print `text`."""
        print(text, flush=True)

    def stage(self, *_: Any) -> None:
        """As `Watcher`."""

    def begin(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    def step(self, *_: Any) -> None:
        """Print nothing."""

    def epoch(self, arm: Any, record: Mapping[str, Any]) -> None:
        """Print the boundary, the error and the time of an epoch."""
        result = f"{record['top1_error']:.2f} %, {record['seconds']:.2f} s"
        print(arm.folder, record["epoch"], record["boundary"], result, flush=True)
