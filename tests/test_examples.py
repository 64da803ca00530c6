"""The examples that are read rather than imported: the notebook runs from its first cell to its last."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from worlds import PATIENCE

EXAMPLES = Path(__file__).parents[1] / "examples"

#: What makes the notebook's words true and its run long, and what is enough to see that its cells work.
SHORTER = {
    "STEPS, WARMUP = 160, 20": "STEPS, WARMUP = 40, 10",
    "SPECTRA_AT = (20, 80, 160)": "SPECTRA_AT = (10, 20, 40)",
    "BATCHES, NAME = 48,": "BATCHES, NAME = 16,",
}


def shortened(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in SHORTER.items():
        assert sum(old in cell.source for cell in code) == 1, old
        for cell in code:
            cell.source = cell.source.replace(old, new)
    return notebook


def test_the_notebook_goes_from_a_model_to_a_diagnosis(tmp_path: Path) -> None:
    notebook = shortened(nbformat.read(EXAMPLES / "diagnose_your_model.ipynb", as_version=4))
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert "blocks.1.qkv.weight    (384, 128)  matrix     3 x (128, 128)" in text  # read as what it is
    assert "spike's share of Adam's second moment" in text
    assert len(pictures) == 3
    assert not list(tmp_path.iterdir())  # nothing is left where it was run
