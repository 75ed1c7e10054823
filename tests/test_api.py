"""`lowcal.compare` and `lowcal.train`: the command's own functions, for scripts and notebooks."""

import base64
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest

import lowcal
from lowcal.cli import main
from lowcal.errors import LowcalError

from .commands import SMALL, lines, small

pytestmark = pytest.mark.usefixtures("undrawn")

AS_DICT = {
    "epochs": 2,
    "batch": 16,
    "model.width": 4,
    "data": {"name": "synthetic", "train_images": 64, "test_images": 32, "image_size": 8, "classes": 4},
    "local.schedule": {"name": "fixed", "epochs": {1: 3}},
}


def records(path):
    return [json.loads(line) for line in (path / "epochs.jsonl").read_text().splitlines()]


class Cells(HTMLParser):
    """The texts of a page's cells, and the sources of its images."""

    def __init__(self):
        super().__init__()
        self.cells, self.images, self._open = [], [], None

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th"):
            self._open = tag
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        if self._open:
            self.cells.append((self._open, data))
        self._open = None


def test_a_comparison_gives_rows_at_three_levels(here, capsys):
    result = lowcal.compare(methods="sgd, local", seeds=2, settings=SMALL, out="out")
    assert "synthetic images" in capsys.readouterr().out  # the progress
    written = json.loads((here / "out" / "summary.json").read_text())["rows"]
    assert result.table == written
    assert result.report == Path("out/report.html")
    assert [(run["method"], run["seed"]) for run in result.runs] == [(m, s) for m in ("sgd", "local") for s in (0, 1)]
    for run in result.runs:
        summary = json.loads((run["folder"] / "summary.json").read_text())
        assert {key: run[key] for key in summary} == summary
        own = [row for row in result.epochs if (row["method"], row["seed"]) == (run["method"], run["seed"])]
        assert [{**record, "method": run["method"], "seed": run["seed"]} for record in records(run["folder"])] == own


def test_the_command_prints_the_result_and_trains_the_same(here, capsys):
    result = lowcal.compare("digits", ["sgd", "local"], settings=AS_DICT, out="out", quiet=True)
    assert capsys.readouterr().out == ""
    assert main(["compare", *small(), "--methods", "sgd,local", "--out", "out", "-q"]) == 0  # finished: the recipe fits
    assert capsys.readouterr().out == f"\n{result}\n"
    assert str(result).endswith("report: out/report.html")
    assert main(["compare", *small(), "--methods", "sgd,local", "--out", "again", "-q"]) == 0
    for method in ("sgd", "local"):
        assert lines(here / "again" / f"{method}-seed0") == lines(here / "out" / f"{method}-seed0")


@pytest.mark.usefixtures("drawn")
def test_a_notebook_shows_a_table_and_a_figure(here):
    result = lowcal.compare(methods=["sgd", "freeze"], settings=AS_DICT, out="out", quiet=True)
    page = Cells()
    page.feed(result._repr_html_())
    heads = [text for kind, text in page.cells if kind == "th"]
    values = [text for kind, text in page.cells if kind == "td"]
    assert heads[:2] == ["method", "top-1 error, %"]
    assert values[:: len(heads)] == ["sgd", "freeze"]
    assert values[1] == f"{result.table[0]['top1_error']:.2f}"
    (image,) = page.images
    drawing = ElementTree.fromstring(base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")))
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert "\n" not in repr(result)


def test_one_run_from_its_start_over_resuming_to_more_epochs(here, capsys):
    first = lowcal.train("digits", "local", settings=AS_DICT, quiet=True)
    folder = Path("runs/digits-local")
    assert (first.folders, first.report) == ([folder], None)
    assert [run["method"] for run in first.runs] == ["local"]
    assert "<td>local</td>" in first._repr_html_()
    assert main(["train", "--resume", "--out", str(folder), "-q"]) == 0  # finished: the command says the same
    assert capsys.readouterr().out == f"{first}\n"
    more = lowcal.train(out=folder, resume=True, extend=True, settings={"epochs": 3}, quiet=True)
    assert [record["epoch"] for record in more.epochs] == [0, 1, 2]
    assert lowcal.train("digits", "local", settings=AS_DICT, quiet=True).folders == [Path("runs/digits-local-2")]


@pytest.mark.parametrize(("arguments", "told"), [
    ({"recipe": "digit"}, "did you mean 'digits'"),
    ({"methods": []}, "no method was given"),
    ({"methods": ["sgd", "locl"]}, "did you mean 'local'"),
    ({"seeds": 0}, "seeds=0: must be a whole number"),
    ({"settings": {"epoch": 3}}, "did you mean 'epochs'"),
    ({"settings": {"epochs": numpy.float32(3)}}, "must be a whole number"),
    ({"settings": "epochs"}, "must read key=value"),
    ({"device": "tpu"}, "unknown device 'tpu'"),
])  # fmt: skip
def test_mistakes_are_told_and_write_nothing(arguments, told, here):
    with pytest.raises(LowcalError, match=re.escape(told)):
        lowcal.compare(**arguments, quiet=True)
    assert list(here.iterdir()) == []


def test_resuming_needs_a_folder(here):
    with pytest.raises(LowcalError, match="give it with --out"):
        lowcal.train(resume=True)


def test_a_comparison_is_for_one_process(here, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LowcalError, match="without torchrun"):
        lowcal.compare()


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_functions_load_nothing_before_they_are_called():
    code = "import sys, lowcal; lowcal.compare, lowcal.train; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(python(code).split())
    assert "lowcal" in loaded
    assert not loaded & {"torch", "numpy", "rich", "yaml", "matplotlib", "jinja2", "typer", "torchvision"}


@pytest.mark.parametrize("package", ["rich", "yaml"])
@pytest.mark.parametrize("call", ["compare()", "train()"])
def test_a_missing_package_is_named_with_its_extra(package, call):
    without = f"import sys; sys.modules[{package!r}] = None"
    code = f"{without}\nimport lowcal\ntry: lowcal.{call}\nexcept lowcal.LowcalError as error: print(error)"
    assert python(code) == f"{package} is not installed; pip install 'lowcal[cli]'\n"


def test_the_example(here, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "compare_in_python.py"))
    example["main"]("out")
    printed = capsys.readouterr().out
    assert "epoch 3: boundary 6 of 10" in printed
    assert "sgd: error" in printed


def test_the_page(here, capsys):
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert [record["epoch"] for record in names["result"].epochs] == [0, 1, 2]
    assert Path("runs/from-python/report.html").is_file()
