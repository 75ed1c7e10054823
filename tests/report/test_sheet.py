import csv
import io

from lowcal.report.sheet import Column, Sheet

COLUMNS = (
    Column("strategy", "strategy"),
    Column("error", "error", "percent"),
    Column("speedup", "speed-up", "ratio"),
    Column("bytes", "memory", "memory"),
    Column("never", "never"),
)
ROWS = (
    {"network": "one", "strategy": "sgd", "error": 6.061, "error_std": 0.1, "speedup": 1.0, "bytes": 2**30},
    {"network": "one", "strategy": "a|b", "error": None, "error_std": None, "speedup": None, "bytes": 3},
    {"network": "two", "strategy": "local", "error": 10.0, "error_std": None, "speedup": 1.5, "bytes": None},
)
SHEET = Sheet("Title", COLUMNS, ROWS, ["A note."], group="network")


def test_text_has_a_part_for_each_network_and_no_empty_column():
    lines = SHEET.text().splitlines()
    assert lines[0] == "Title"
    assert lines[2].split() == ["strategy", "error", "speed-up", "memory"]
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert "  sgd       6.06 ± 0.10     1.00×  1.00 GiB" in lines
    assert "  local           10.00     1.50×         –" in lines
    assert lines[-1] == "A note."


def test_markdown_has_the_group_in_a_column_and_no_stray_bars():
    lines = SHEET.markdown().splitlines()
    assert lines[0] == "**Title**"
    assert lines[2:4] == ["| network | strategy | error | speed-up | memory |", "| --- | --- | ---: | ---: | ---: |"]
    assert lines[5] == "| one | a\\|b | – | – | 3 B |"


def test_csv_has_all_fields_unrounded():
    rows = list(csv.DictReader(io.StringIO(SHEET.csv())))
    assert [row["error"] for row in rows] == ["6.061", "", "10.0"]
    assert rows[0]["error_std"] == "0.1"


def test_a_table_without_rows_has_its_title_and_notes():
    sheet = Sheet("Title", COLUMNS, [], ["Nothing."])
    assert "Nothing." in sheet.text()
    assert "Title" in sheet.markdown()
