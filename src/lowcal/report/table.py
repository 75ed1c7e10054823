"""A table whose columns are declared once, written as text, Markdown, CSV or JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowcal.files import FORMAT, atomic_write, finite, memory

ABSENT = "–"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: the rows' field `name` under `heading`.

    Attributes:
        format: "text" (aligned left), "number" (at most one decimal), "memory" (bytes), "amount" (with a decimal
            prefix), "duration" (seconds), a format specification such as ".2f", or a function of the whole row. With
            a specification, the row's field NAME_std, where there is one, is the deviation over as many seeds as its
            field `seeds` says, and is shown too.
        unit: follows the value, with its space.
        scale: the value and its deviation are divided by it.
        left: aligns a column that is not text to the left.
    """

    name: str
    heading: str
    format: str | Callable[[Row], str] = "text"
    unit: str = ""
    scale: float = 1.0
    left: bool = False

    @property
    def is_left(self) -> bool:
        """Whether the column is aligned to the left."""
        return self.left or self.format == "text"

    def cell(self, row: Row) -> str:
        """Return the row's value, rounded for reading; ABSENT for an unknown number."""
        if not isinstance(self.format, str):
            return self.format(row)
        value = row.get(self.name)
        if value is None or value == "":
            return "" if self.format == "text" else ABSENT
        if self.format in _FORMATS:
            return f"{_FORMATS[self.format](value)}{self.unit}"
        deviation = row.get(f"{self.name}_std")
        return with_spread(
            value / self.scale,
            None if deviation is None else deviation / self.scale,
            row.get("seeds"),
            self.format,
            self.unit,
        )


@dataclass(frozen=True)
class Table:
    """Rows of plain values under declared columns.

    Attributes:
        rows: files (CSV, JSON) have all their fields, unrounded; text and Markdown have those of the columns.
        title: one line.
        lead: paragraphs between the title and the table.
        notes: paragraphs below the table.
        group: the field by whose value the text falls into parts, and which Markdown shows in a first column.
        drop_empty: leaves out the columns in which no row has a value.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    group: str | None = None
    drop_empty: bool = False

    @property
    def shown(self) -> list[Column]:
        """The columns of text and Markdown."""
        return [column for column in self.columns if not self.drop_empty or self._has_value(column)]

    def cells(self) -> list[list[str]]:
        """Return each row's values under the shown columns, rounded for reading."""
        return [[column.cell(row) for column in self.shown] for row in self.rows]

    def text(self) -> str:
        """Return aligned text, columns two spaces apart and as wide as their longest cell."""
        columns, indent = self.shown, "  " if self.group else ""
        headings, lines = [column.heading for column in columns], self.cells()
        widths = [max(map(len, cells)) for cells in zip(headings, *lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            padded = (
                cell.ljust(width) if column.is_left else cell.rjust(width)
                for cell, width, column in zip(cells, widths, columns, strict=True)
            )
            return f"{indent}{'  '.join(padded)}".rstrip()

        table = [line(headings), "-" * (len(indent) + sum(widths) + 2 * len(widths) - 2)]
        part: Any = None
        for row, cells in zip(self.rows, lines, strict=True):
            if self.group and row[self.group] != part:
                part = row[self.group]
                table.append(str(part))
            table.append(line(cells))
        head = [f"{paragraph}\n" for paragraph in (self.title, *self.lead) if paragraph]
        return "\n".join([*head, *table, *([""] * bool(self.notes)), *self.notes])

    def markdown(self) -> str:
        """Return a Markdown table, with the title in bold and the lead and notes as paragraphs."""
        group = [Column(self.group, self.group)] if self.group else []
        columns = [*group, *self.shown]
        table = [[column.heading for column in columns], ["---" if column.is_left else "---:" for column in columns]]
        table += [[escaped(column.cell(row)) for column in columns] for row in self.rows]
        lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        title = [f"**{escaped(self.title)}**"] if self.title else []
        return "\n\n".join([*title, *map(escaped, self.lead), lines, *map(escaped, self.notes)]) + "\n"

    def csv(self) -> str:
        """Return all fields of all rows as CSV; an unknown value is an empty field."""
        stream = io.StringIO()
        writer = csv.DictWriter(
            stream, list(dict.fromkeys(name for row in self.rows for name in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(self.rows)
        return stream.getvalue()

    def json(self, **facts: Any) -> str:
        """Return a JSON object of the format, `facts`, and all fields of all rows; what is not finite is null."""
        content = {"format": FORMAT, **facts, "rows": [dict(row) for row in self.rows]}
        return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, stem: Path, kinds: Sequence[str] = ("md", "csv", "json"), **facts: Any) -> list[Path]:
        """Write STEM.md, STEM.csv and STEM.json, or some of these kinds; `facts` go into the JSON.

        Raises:
            LowcalError: a file cannot be written.
        """
        writers = {"md": self.markdown, "csv": self.csv, "json": lambda: self.json(**facts)}
        files = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
        for file, kind in zip(files, kinds, strict=True):
            atomic_write(file, writers[kind]().encode())
        return files

    def _has_value(self, column: Column) -> bool:
        return any(column.cell(row) not in ("", ABSENT) for row in self.rows)


def escaped(text: str) -> str:
    """Return Markdown that shows a text as it is, in one line; an underscore within a word needs nothing."""
    return re.sub(r"([\\`*\[\]<>|~&#!$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def with_spread(
    value: float | None, deviation: float | None, seeds: int | None, spec: str = ".2f", unit: str = ""
) -> str:
    """Return a mean over seeds for reading: '9.50', of two seeds '9.50 (9.00 to 10.00)', of more '9.50 ± 0.30'.

    Args:
        deviation: the sample deviation; None for one seed.
        seeds: how many; None counts as many.
        spec: the format specification of each number.
    """
    if value is None:
        return ABSENT
    if deviation is None:
        return f"{value:{spec}}{unit}"
    if seeds == 2:
        low, high = of_two(value, deviation)
        return f"{value:{spec}}{unit} ({low:{spec}} to {high:{spec}})"
    return f"{value:{spec}} ± {deviation:{spec}}{unit}"


def of_two(mean: float, deviation: float) -> tuple[float, float]:
    """Return the two values with this mean and sample deviation, which is their distance over the root of 2."""
    return mean - deviation / math.sqrt(2), mean + deviation / math.sqrt(2)


def spread_notes(seeds: Iterable[int]) -> list[str]:
    """Return what explains the spreads in a table whose rows have these numbers of seeds."""
    counts = set(seeds)
    notes = ["a to b: the lower and the higher of two seeds."] if 2 in counts else []
    return [*notes, "± is the sample deviation over seeds."] if max(counts, default=0) > 2 else notes


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which times up to `seconds` read best, and its length in seconds."""
    if seconds < 600:
        return "s", 1.0
    if seconds < 3 * 3600:
        return "min", 60.0
    return ("h", 3600.0) if seconds < 10 * 24 * 3600 else ("days", 24 * 3600.0)


def duration(seconds: float) -> str:
    """Return a time for reading: '12.3 s', '14.0 min', '3.2 h', '12.5 days'."""
    unit, scale = time_unit(seconds)
    return f"{seconds / scale:.1f} {unit}"


def amount(number: float) -> str:
    """Return a large number with three digits, a space and a decimal prefix: '1.82 G', '999 '."""
    unit, prefixes = 0, ("", "k", "M", "G", "T", "P")
    while number >= 1000 and unit < len(prefixes) - 1:
        number, unit = number / 1000, unit + 1
    digits = 0 if unit == 0 else max(0, 3 - len(str(int(number))))
    return f"{number:.{digits}f} {prefixes[unit]}"


_FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "number": lambda value: f"{value:.1f}".removesuffix(".0"),
    "memory": memory,
    "amount": lambda value: amount(value).rstrip(),
    "duration": duration,
}
