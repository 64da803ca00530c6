"""The examples that are read rather than imported: the notebook runs as a whole, a script as users run it."""

import re
import shutil
import subprocess
import sys
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


def test_a_model_is_fine_tuned_through_the_trainer_of_transformers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune_trainer.py", "--steps", "20", "--out", tmp_path],
        capture_output=True, text=True, check=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    before, after = map(float, re.search(r"evaluation loss (\S+) -> (\S+)", done.stdout).groups())
    assert after < before - 0.2
    assert "28 x matrix: adam → clip" in done.stdout  # two adapters for each of seven layers of two blocks
    assert "learning_rate/head" in done.stdout
    assert (tmp_path / "checkpoint-20" / "adapter_model.safetensors").exists()


def pretrain(folder: Path, ranks: int) -> list[str]:
    """What examples/pretrain.py prints of six steps, the first three of which may be in the folder."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    tiny = ["--steps=6", "--every=3", "--rows=2", "--length=32", "--width=32", "--depth=1"]
    command = [sys.executable, *launch, str(EXAMPLES / "pretrain.py"), f"--out={folder}", *tiny]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout.splitlines()


def test_pretraining_resumes_exactly_and_on_another_number_of_ranks(tmp_path: Path) -> None:
    third, sixth = pretrain(tmp_path, 1)
    assert third.startswith("step 3: ")
    shutil.rmtree(tmp_path / "step-6")
    assert pretrain(tmp_path, 1) == [sixth]
    shutil.rmtree(tmp_path / "step-6")
    (sharded,) = pretrain(tmp_path, 2)
    assert sharded.startswith("step 6: ")
