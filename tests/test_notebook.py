"""The notebook runs from its first cell to its last, and its stored outputs show a table and a figure."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.filterwarnings("ignore")  # Jupyter's own

NOTEBOOK = Path(__file__).parents[1] / "examples" / "compare.ipynb"


def executed(tmp_path, epochs):
    """The notebook after a run with so many epochs, and its text outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = notebook.cells[1]
    assert "epochs = 16" in first.source
    first.source = first.source.replace("epochs = 16", f"epochs = {epochs}")
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources=place).execute()
    return notebook


def kinds(notebook):
    """The kinds of content of each cell's outputs."""
    return [{kind for output in cell.get("outputs", []) for kind in output.get("data", {})} for cell in notebook.cells]


def check(notebook):
    shown = kinds(notebook)
    assert any("text/html" in kind for kind in shown)
    assert any("image/png" in kind for kind in shown)
    assert all(output["output_type"] != "error" for cell in notebook.cells for output in cell.get("outputs", []))
    (loop,) = [cell.outputs for cell in notebook.cells if "LoCal(" in cell.source and cell.cell_type == "code"]
    assert "epoch 6: 2 of 3 layers frozen, error" in "".join(output["text"] for output in loop)


def test_it_runs_with_few_epochs(tmp_path):
    check(executed(tmp_path, 2))


@pytest.mark.slow
def test_it_runs_as_it_stands(tmp_path):
    check(executed(tmp_path, 16))


def test_what_is_stored_shows_a_table_and_a_figure():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(notebook)
    assert NOTEBOOK.stat().st_size < 300_000
