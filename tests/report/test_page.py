import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import lowcal
from lowcal.errors import LowcalError
from lowcal.report.page import write_report
from lowcal.report.runs import code_note, read_runs

from .synthetic import MACHINE, write_run

VOID = {"meta", "br", "hr", "img", "input", "link"}
FIELDS = [
    "method", "seeds", "epochs", "top1_error", "top1_error_std", "seconds", "seconds_std", "speedup", "speedup_std",
    "flops_ratio", "peak_memory_bytes", "boundary", "layers", "last_memory_bytes", "test_images", "top1_error_low",
    "top1_error_high",
]  # fmt: skip


class Page(HTMLParser):
    """Checks that elements nest; keeps tags, attributes, ids, cells and text."""

    def __init__(self, markup):
        super().__init__()
        self.stack, self.tags, self.references, self.ids, self.cells, self.pieces = [], [], [], [], [], []
        self.feed(markup)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
            assert not name.startswith("on")
        if tag not in VOID:
            self.stack.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.pieces.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A folder with the report of a comparison, and what `write_report` returned."""
    root = tmp_path_factory.mktemp("comparison")
    for seed in (0, 1):
        write_run(root, "sgd", seed, error=10.0 + seed, seconds=12.0, flops=3000)
        write_run(root, "freeze", seed, error=12.0 + seed, seconds=8.0, flops=2400, boundary=4)
    return root, write_report(root)


@pytest.fixture
def without_figures(monkeypatch):
    """Drawing takes longer than all else."""
    monkeypatch.setattr("lowcal.report.page.inline_svg", lambda *_: "")


@pytest.mark.usefixtures("without_figures")
def test_the_notes_say_how_a_batch_changed(tmp_path):
    write_run(tmp_path, "sgd", epochs=4)
    write_run(tmp_path, "local", epochs=4, batches=[64, 64, 128, 256])
    write_run(tmp_path, "freeze", epochs=4, batches=[64] * 4, refused=[None, None, 128, 128])
    text = " ".join(write_report(tmp_path).notes)
    assert "Batch: local-seed0 64, from epoch 3 on 128, from epoch 4 on 256; freeze-seed0 64, no memory for 128" in text
    assert "no memory for 128 in epoch 3." in text


def test_a_comparison_gets_its_four_files_with_the_same_numbers(comparison):
    root, report = comparison
    summary = json.loads((root / "summary.json").read_text())
    assert summary == report.summary
    assert [list(row) for row in summary["rows"]] == [FIELDS, FIELDS]
    freeze = summary["rows"][1]
    assert (freeze["top1_error"], freeze["speedup"], freeze["flops_ratio"]) == (12.5, 1.5, pytest.approx(0.8))
    assert summary["format"] == 1
    assert (summary["recipe"], summary["model"], summary["dataset"]) == ("digits", "resnet8", "digits")
    assert summary["environment"] == MACHINE
    assert summary["settings"] == {"name": "digits", "epochs": 3, "optimizer": {"lr": 0.05}}
    assert summary["unfinished"] == []
    with (root / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["sgd", "freeze"]
    assert list(lines[0]) == FIELDS
    assert float(lines[1]["speedup"]) == 1.5
    markdown = (root / "summary.md").read_text()
    assert "| freeze | 12.50 (12.00 to 13.00) | 8.00 s (8.00 to 8.00) | 1.50× (1.50 to 1.50) | 0.80× |" in markdown
    assert "freeze trained 1.50× faster than SGD at +2.0 points of top-1 error" in markdown
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == [
        "report.html",
        "summary.csv",
        "summary.json",
        "summary.md",
    ]


def test_the_page_is_well_formed_and_shows_the_table_the_figures_and_the_settings(comparison):
    page = Page((comparison[0] / "report.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == page.tags.count("figure") == 6
    text = " ".join(page.pieces)
    assert page.tags.count("li") == 1 + 4  # what came out, and the run folders
    for wanted in ("freeze trained 1.50× faster", "Some, Processor", "2.15.0", "e1a58719", "name: digits", "lr: 0.05"):
        assert wanted in text
    start = page.cells.index("freeze")
    assert page.cells[start : start + 9] == [
        "freeze", "12.50 (12.00 to 13.00)", "8.00 s (8.00 to 8.00)", "1.50× (1.50 to 1.50)", "0.80×",
        "1.00 MiB", "1.00 MiB", "4 of 9", "2",
    ]  # fmt: skip
    assert "different machines" not in text


def test_the_page_needs_no_network_and_runs_its_own_script_alone(comparison):
    root, _ = comparison
    markup = (root / "report.html").read_text(encoding="utf-8")
    page = Page(markup)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    script = re.search("<script>(.*?)</script>", markup, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in markup
    within = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert within <= set(page.ids)
    assert {reference for reference in page.references if not reference.startswith("#")} == {
        "summary.csv", "summary.json", "summary.md", "sgd-seed0", "sgd-seed1", "freeze-seed0", "freeze-seed1",
    }  # fmt: skip
    assert set(re.findall(r"url\(#([^)]*)\)", markup)) <= set(page.ids)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", markup)


@pytest.mark.usefixtures("without_figures")
def test_the_page_says_what_the_words_mean_and_how_it_was_made(tmp_path):
    command = "lowcal compare --set 'model.name=<b>'"
    for method in ("sgd", "local-step"):
        write_run(tmp_path / "a folder" / "runs", method, machine=MACHINE | {"command": command})
    write_report(tmp_path / "a folder" / "runs", tmp_path / "out" / "report")
    markup = (tmp_path / "out" / "report" / "report.html").read_text(encoding="utf-8")
    page, text = Page(markup), " ".join(re.sub("<[^>]*>", " ", markup).split())
    assert "sgd all layers learn by SGD local layers before the boundary learn" in text
    assert "keep their weights" not in text  # a method that is not shown
    assert text.count("lowcal compare --set &#39;model.name=&lt;b&gt;&#39;") == 1
    assert "processor Some, Processor cores 4 threads 2" in text
    assert "device name" not in text  # it is the processor's
    links = [reference for reference in page.references if "runs" in reference]
    assert links == ["../../a%20folder/runs/sgd-seed0", "../../a%20folder/runs/local-step-seed0"]


def test_the_figures_are_well_formed_and_follow_the_pages_colours(comparison):
    markup = (comparison[0] / "report.html").read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", markup, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert set(root.attrib) == {"viewBox", "role", "aria-label"}
        drawn = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg))
        assert drawn <= {"none", "currentColor", "var(--series-1)"}
        assert "var(--series-1)" in drawn
        assert "font-family" not in svg
        shown = {"freeze"} if root.get("aria-label").startswith("boundary") else {"sgd", "freeze"}
        assert {element.text for element in root.iter("text")} & {"sgd", "freeze"} == shown
    assert markup.count("--series-1: #") == 2  # on a light and on a dark page


def test_names_and_recipes_of_others_cannot_break_the_page(tmp_path):
    hostile = '<script>alert(1)</script> $x_{"'
    write_run(
        tmp_path, hostile, name="run", label="</style><b>", model=hostile, recipe="name: '</pre><script>'\nepochs: 3\n"
    )
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert page.tags.count("style") == page.tags.count("pre") == 1
    assert hostile in page.cells
    markdown = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "script" in markdown
    assert not re.search(r"(?<!\\)[<>$]", markdown)


@pytest.mark.usefixtures("without_figures")
def test_unfinished_runs_are_shown_and_marked(tmp_path):
    write_run(tmp_path, "sgd", 0)
    write_run(tmp_path, "freeze", 0, done=2)
    report = write_report(tmp_path)
    assert report.summary["unfinished"] == [{"run": "freeze-seed0", "epochs": 2, "planned": 3}]
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).pieces)
    assert "Unfinished: freeze-seed0 (2 of 3 epochs)." in text
    assert "freeze (unfinished, 2 epochs)" in text
    assert report.notes == ["Unfinished: freeze-seed0 (2 of 3 epochs)."]


@pytest.mark.usefixtures("without_figures")
def test_runs_of_different_code_are_named(tmp_path):
    write_run(tmp_path, "sgd", machine=MACHINE | {"code": "aaaa00000000"})
    write_run(tmp_path, "local", boundary=4, machine=MACHINE | {"code": "aaaa00000000", "commit": None})
    assert code_note(read_runs([tmp_path])) is None
    write_run(tmp_path, "freeze", boundary=4, machine=MACHINE | {"code": "bbbb00000000"})
    write_run(tmp_path, "prune")  # of a time without digests: its commit says what it is
    report = write_report(tmp_path, tmp_path / "report")
    made = "aaaa00000000 (sgd-seed0, local-seed0), bbbb00000000 (freeze-seed0), e1a58719 (prune-seed0)"
    assert report.notes == [f"The runs were made by different code: {made}."]
    assert report.summary["environment"]["code"] == "aaaa00000000, bbbb00000000"


@pytest.mark.usefixtures("without_figures")
def test_runs_of_several_folders_go_to_a_new_one(tmp_path):
    write_run(tmp_path / "a", "sgd", label="small")
    write_run(tmp_path / "b", "freeze", boundary=4, machine=MACHINE | {"device_name": "another"})
    out = tmp_path / "new" / "report"
    report = write_report([tmp_path / "a", tmp_path / "b" / "freeze-seed0"], out)
    assert report.page == out / "report.html"
    assert [row["method"] for row in report.summary["rows"]] == ["sgd", "freeze"]
    assert report.summary["label"] == "small"
    assert report.summary["rows"][1]["speedup"] is None
    assert report.notes == ["The runs ran on different machines: their times are not compared."]
    assert "Recipe: small." in (out / "summary.md").read_text()
    assert write_report([tmp_path / "a"], out).summary["rows"][0]["method"] == "sgd"


@pytest.mark.parametrize("epochs", [1, 40])
def test_any_number_of_epochs_and_unrecorded_values_can_be_drawn(tmp_path, epochs):
    write_run(tmp_path, "sgd", epochs=epochs, error=float("nan") if epochs == 1 else 0.0, seconds=0.0)
    report = write_report(tmp_path)
    Page(report.page.read_text(encoding="utf-8"))


@pytest.mark.usefixtures("without_figures")
def test_bad_input_writes_nothing(tmp_path):
    run = write_run(tmp_path / "runs", "sgd").path
    before = run.joinpath("summary.json").read_bytes()
    with pytest.raises(LowcalError, match="give --out DIR"):
        write_report([run])
    for out in (None, run):
        with pytest.raises(LowcalError, match=r"holds a run, whose summary\.json would be lost"):
            write_report(run, out)
    assert run.joinpath("summary.json").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    for content in ('{"format": 1}', '{"mine": 1}', "{"):
        (other / "summary.json").write_text(content)
        with pytest.raises(LowcalError, match=r"other/summary\.json"):
            write_report([run], other)
        assert (other / "summary.json").read_text() == content
    (tmp_path / "file").write_text("")
    with pytest.raises(LowcalError, match="cannot make"):
        write_report([run], tmp_path / "file")
    (run / "epochs.jsonl").write_text("{}\n")
    with pytest.raises(LowcalError, match=r"line 1 of .*epochs\.jsonl lacks"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_needs_no_torch(tmp_path):
    """Its modules are loaded with torch made impossible to import, without the package's own __init__."""
    write_run(tmp_path, "sgd")
    code = (
        "import sys, types; from pathlib import Path\n"
        "package = types.ModuleType('lowcal'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules.update({'lowcal': package, 'torch': None, 'torchvision': None})\n"
        "from lowcal.report.page import write_report; write_report(Path(sys.argv[2]))\n"
    )
    source = Path(lowcal.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()
