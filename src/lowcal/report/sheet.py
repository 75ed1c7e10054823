"""A table with columns of its own: rows of plain values, as text, Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowcal.report.intervals import ABSENT, with_spread
from lowcal.report.tables import memory

__all__ = ["Column", "Form", "Sheet"]

Form = Literal["text", "percent", "ratio", "number", "memory"]


@dataclass(frozen=True)
class Column:
    """A column: the rows' field `key` under `heading`.

    The field KEY_std, where a row has it, is the deviation over as many seeds as its field `seeds` says.
    """

    key: str
    heading: str
    form: Form = "text"

    def cell(self, row: Mapping[str, Any]) -> str:
        """The value of `row` for reading."""
        value, deviation = row.get(self.key), row.get(f"{self.key}_std")
        if value is None or value == "":
            return "" if self.form == "text" else ABSENT
        if self.form == "text":
            return str(value)
        if self.form == "memory":
            return memory(value)
        if self.form == "number":
            return f"{value:.1f}".removesuffix(".0")
        return with_spread(value, deviation, row.get("seeds"), 2, "×" if self.form == "ratio" else "")


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: says also at what scale it was measured.
        rows: plain values by name; a file has all of them, a printed table those of its columns.
        group: the field by whose value a printed table falls into parts; None for one part.
        notes: lines below it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    group: str | None = None

    def text(self) -> str:
        """The table as aligned text with its title and notes."""
        shown = self._shown()
        widths = [max(len(column.heading), *(len(column.cell(row)) for row in self.rows)) for column in shown]
        lines = [_line([column.heading for column in shown], widths, shown)]
        lines.append("─" * (sum(widths) + 2 * (len(widths) - 1)))
        part = None
        for row in self.rows:
            if self.group and row[self.group] != part:
                part = row[self.group]
                lines.append(str(part))
            cells = [column.cell(row) for column in shown]
            if self.group:
                cells[0] = f"  {cells[0]}"
            lines.append(_line(cells, [widths[0] + 2 * bool(self.group), *widths[1:]], shown))
        if self.group:
            lines[:2] = [f"  {lines[0]}", f"──{lines[1]}"]
        return "\n".join([self.title, "", *lines, "", *self.notes])

    def markdown(self) -> str:
        """The table in Markdown with its title and notes."""
        shown = self._shown()
        if self.group:
            shown = [Column(self.group, self.group), *shown]
        rules = ["---" if column.form == "text" else "---:" for column in shown]
        lines = [[column.heading for column in shown], rules]
        lines += [[column.cell(row).replace("|", "\\|") for column in shown] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"**{self.title}**", table, *self.notes]) + "\n"

    def csv(self) -> str:
        """All fields of all rows, unrounded; an unknown value is an empty field."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        stream = io.StringIO()
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return stream.getvalue()

    def _shown(self) -> list[Column]:
        """The columns in which any row has something."""
        return [column for column in self.columns if any(row.get(column.key) not in (None, "") for row in self.rows)]


def _line(cells: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    padded = (
        cell.ljust(width) if column.form == "text" else cell.rjust(width)
        for cell, width, column in zip(cells, widths, columns, strict=True)
    )
    return "  ".join(padded).rstrip()
