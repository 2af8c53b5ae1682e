"""The notebooks run from top to bottom on what ships, with smaller parameters than a reader's."""

import copy
import os
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "examples"
SMALL = {
    "quantize_sam": {"CHECKPOINT": "mini-scenes", "IMAGES": 2, "POINTS": 3},
    "reproduce_table": {
        "CHECKPOINT": "mini-scenes",
        "LIMIT": 2,
        "METHODS": ["minmax"],
        "BITS": ["44"],
        "ITERATIONS": 0,
        "CALIBRATION_IMAGES": 2,
    },
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def executed(name, folder, changes):
    """The notebook after a run in a folder, with a cell of changes after that of its parameters."""
    notebook = copy.deepcopy(read(name))
    (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    lines = "\n".join(f"{key} = {value!r}" for key, value in changes.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook's own machinery
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Lets the kernel, whose folder is another, import this checkout."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_is_stored_without_outputs(name):
    for cell in read(name).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_first_notebook(tmp_path):
    done = executed("quantize_sam", tmp_path, SMALL["quantize_sam"])
    text = printed(done)
    assert "the same bits: True" in text and "encoder.onnx" in text
    figures = [o for cell in done.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(figures) == 4
    assert (tmp_path / "quantized.safetensors").is_file()


@pytest.mark.slow
def test_the_second_notebook_and_its_second_run(tmp_path):
    done = executed("reproduce_table", tmp_path, SMALL["reproduce_table"])
    text = printed(done)
    assert "SAM-L, 20,000 iterations: T4" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "_w4a4" in line]
    assert {row.split("|")[2].strip() for row in rows} == {"minmax_w4a4"}
    records = (tmp_path / "table" / "records.jsonl").read_text()
    # What is there is not made again.
    assert text == printed(executed("reproduce_table", tmp_path, SMALL["reproduce_table"]))
    assert (tmp_path / "table" / "records.jsonl").read_text() == records
