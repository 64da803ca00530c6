"""Writes docs/optimizers.md: what a step of every recipe costs, beside torch's optimizers and pytorch-optimizer's."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from spectrim.lab.bench import bench_tables, operator_bench, optimizer_bench
from spectrim.lab.files import write_text

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
COMPILED = ("adamw", "spectra")
PARTS = ("table", "compiled")

TEXT = """\
# What a step costs

<!-- Written by benchmarks/optimizers.py. Edit that. -->

{machine}. One step on the matrices of one GPT-2-small block (2304x768, 768x768, 3072x768, 768x3072), all optimizers
in turns in one run, medians of {repeats} rounds. Ratios are medians of the ratios of each round. Read the ratios:
milliseconds are this machine's. Between short steps a ratio is uncertain by a tenth or two. "extra" is the most memory
that a step needs at a time beyond weights, gradients and state; the largest matrix has 9.4 MB. "not orthogonal" is
‖UUᵀ/s − I‖_F/√m of the update U: zero for an orthogonal one.

{table}

`spectrim bench optimizers` measures the same on your machine.

- torch's Muon computes in bfloat16. This processor has instructions for that, and its products run at over twice the
  rate of float32. spectrim computes in float32 on a CPU. On processors without such instructions torch's Muon is far
  slower, and the ratios to it are larger.
- `muon` orthogonalises to 1e-3 by a float64 eigendecomposition. `muon rough` is `orthogonalize_steps=5`: at least as
  orthogonal as torch's.
- Clipping costs the Gram matrix, its inverse square root by a few inverses, and one more product.
- `adamw` is torch's fused kernel and one more pass over the gradients, which finds out whether all are finite before
  anything moves.

## Under torch.compile

The step compiles once; a change of a learning rate in a tensor does not compile it again. Under the compiler operators
take the forms for accelerators, which read no number back. On a CPU these are slower.

{compiled}
"""


def markdown(rows: Iterable[optimizer_bench.OptimizerRow]) -> str:
    lines = [bench_tables.optimizer_cells(row) for row in rows]
    header = list(lines[0])
    body = [header, ["---", *("---:" for _ in header[1:])], *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def measure(part: str, repeats: int) -> list[optimizer_bench.OptimizerRow]:
    if part == "compiled":
        return optimizer_bench.bench_optimizers(blocks=1, repeats=5, contenders=COMPILED, compiled=True)
    return optimizer_bench.bench_optimizers(blocks=1, repeats=repeats)


def measured(part: str, folder: Path, options: list[str]) -> list[optimizer_bench.OptimizerRow]:
    """A part's rows, measured by a process of its own unless the folder has them."""
    path = folder / f"{part}.json"
    if not path.is_file():
        command = [sys.executable, __file__, "--part", part, "--rows", str(folder), *options]
        subprocess.run(command, check=True)
    return [optimizer_bench.OptimizerRow(**row) for row in json.loads(path.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=Path, help="a folder for what is measured; what is there is not measured again")
    parser.add_argument("--part", choices=PARTS, help="measure this alone, into the folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, operator_bench.threads(arguments.threads) as count:
        folder = arguments.rows or Path(temporary)
        if arguments.part:
            rows = [asdict(row) for row in measure(arguments.part, arguments.repeats)]
            write_text(folder / f"{arguments.part}.json", json.dumps(rows))
            return
        options = ["--repeats", str(arguments.repeats), "--threads", str(count)]
        tables = {part: markdown(measured(part, folder, options)) for part in PARTS}
    machine = f"CPU, {count} threads, torch {torch.__version__}, float32"
    write_text(PAGE, TEXT.format(machine=machine, repeats=arguments.repeats, **tables))


if __name__ == "__main__":
    main()
