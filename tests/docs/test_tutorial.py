"""The tutorial notebook: small, whole, and it runs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_its_outputs_are_saved_and_small():
    assert NOTEBOOK.stat().st_size < 30_000
    cells = code_cells()
    assert len(cells) >= 7
    for cell in cells:
        code = "".join(cell["source"])
        compile(code, NOTEBOOK.name, "exec")
        assert len(cell["outputs"]) == ("print(" in code), code
        assert all(output["output_type"] == "stream" and output["name"] == "stdout" for output in cell["outputs"])


@pytest.mark.slow
def test_it_runs_and_prints_what_is_saved():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in code_cells()]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    ran = ["".join(one["text"] for one in cell["outputs"]) for cell in notebook.cells if cell["cell_type"] == "code"]
    assert ran == saved
