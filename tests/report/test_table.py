import csv
import io
import json
import math
import re
from statistics import mean, stdev

import pytest

from lowcal.errors import LowcalError
from lowcal.files import memory
from lowcal.report.table import (
    Column,
    Table,
    amount,
    duration,
    escaped,
    of_two,
    spread_notes,
    with_spread,
)

COLUMNS = (
    Column("strategy", "strategy"),
    Column("error", "error", ".2f"),
    Column("speedup", "speed-up", ".2f", "×"),
    Column("bytes", "memory", "memory"),
    Column("never", "never"),
)
ROWS = (
    {"network": "one", "strategy": "sgd", "error": 6.061, "error_std": 0.1, "speedup": 1.0, "bytes": 2**30},
    {"network": "one", "strategy": "a|b", "error": None, "error_std": None, "speedup": None, "bytes": 3},
    {"network": "two", "strategy": "local", "error": 10.0, "error_std": None, "speedup": 1.5, "bytes": None},
)
TABLE = Table(COLUMNS, ROWS, "Title", notes=["A note."], group="network", drop_empty=True)


def test_text_has_a_part_for_each_network_and_no_empty_column():
    lines = TABLE.text().splitlines()
    assert lines[0] == "Title"
    assert lines[2].split() == ["strategy", "error", "speed-up", "memory"]
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert "  sgd       6.06 ± 0.10     1.00×  1.00 GiB" in lines
    assert "  local           10.00     1.50×         –" in lines
    assert lines[-1] == "A note."


def test_markdown_has_the_group_in_a_column_and_no_stray_bars():
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "**Title**"
    assert lines[2:4] == ["| network | strategy | error | speed-up | memory |", "| --- | --- | ---: | ---: | ---: |"]
    assert lines[5] == "| one | a\\|b | – | – | 3 B |"


def test_csv_has_all_fields_unrounded():
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert [row["error"] for row in rows] == ["6.061", "", "10.0"]
    assert rows[0]["error_std"] == "0.1"


def test_a_table_without_rows_has_its_title_and_notes():
    table = Table(COLUMNS, [], "Title", notes=["Nothing."])
    assert "Nothing." in table.text()
    assert "Title" in table.markdown()


def test_a_column_divides_by_its_scale_and_may_read_the_whole_row():
    columns = (
        Column("seconds", "time", ".1f", " min", scale=60),
        Column("", "both", lambda row: f"{row['a']}/{row['b']}"),
    )
    (cells,) = Table(columns, [{"seconds": 90.0, "seconds_std": 6.0, "seeds": 3, "a": 1, "b": 2}]).cells()
    assert cells == ["1.5 ± 0.1 min", "1/2"]


def test_files_have_every_field_and_facts(tmp_path):
    rows = [{"a": 1.25, "b": math.nan}]
    files = Table([Column("a", "A", ".1f")], rows, "T").write(tmp_path / "x.y", note="n")
    assert [file.name for file in files] == ["x.y.md", "x.y.csv", "x.y.json"]
    assert json.loads(files[2].read_text()) == {"format": 1, "note": "n", "rows": [{"a": 1.25, "b": None}]}
    with pytest.raises(LowcalError, match="absent"):
        Table([], []).write(tmp_path / "absent" / "x")


@pytest.mark.parametrize(("number", "text"), [(999, "999 "), (1280, "1.28 k"), (75.5e6, "75.5 M"), (123e9, "123 G")])
def test_amounts(number, text):
    assert amount(number) == text


def test_units():
    assert [memory(count) for count in (0, 1023, 1536, 200 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "200 MiB",
        "3.00 GiB",
    ]
    seconds = (0.04, 599, 600, 4 * 3600, 240 * 3600)
    assert [duration(each) for each in seconds] == ["0.0 s", "599.0 s", "10.0 min", "4.0 h", "10.0 days"]


@pytest.mark.parametrize(
    "text",
    ["*bold* **more** _slanted_ __x", "a|b `code` $x$", "<b>&amp;</b> [a](b) ![c](d)", "# ~~gone~~ \\*", "two\nlines"],
)
def test_escaped_text_has_no_markup_left_and_is_one_line(text):
    shown = escaped(text)
    assert re.sub(r"\\(.)", r"\1", shown) == text.replace("\n", " ")
    bare = re.sub(r"\\.", "", shown)
    assert not re.search(r"[*`<>\[\]|~&#$\n]|\b_|_\b", bare)
    assert escaped("mobilenet_v2, 1.51×, 3.2 ± 0.1 %") == "mobilenet_v2, 1.51×, 3.2 ± 0.1 %"


def test_the_two_seeds_values_come_back():
    values = [9.25, 10.5]
    assert of_two(mean(values), stdev(values)) == pytest.approx(values)
    assert with_spread(mean(values), stdev(values), 2, unit="×") == "9.88× (9.25 to 10.50)"


def test_spreads_for_reading():
    assert with_spread(None, None, 1) == "–"
    assert with_spread(9.5, None, 1, unit=" s") == "9.50 s"
    assert with_spread(9.5, 0.3, 3) == "9.50 ± 0.30"
    assert spread_notes([1, 1]) == []
    assert len(spread_notes([1, 2])) == len(spread_notes([3, 1])) == 1
    assert len(spread_notes([2, 3])) == 2
