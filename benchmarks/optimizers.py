"""Writes docs/optimizers.md: what a step of every recipe costs, beside torch's optimizers and pytorch-optimizer's."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from spectrim.lab import bench_cli, bench_operators, bench_optimizers
from spectrim.lab.files import write_text

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
COMPILED = ("adamw", "spectra")

TEXT = """\
# What a step costs

<!-- Written by benchmarks/optimizers.py. Edit that. -->

{machine}. One step on the matrices of one GPT-2-small block (2304x768, 768x768, 3072x768, 768x3072), all optimizers
in turns in one run, medians of {repeats} rounds. Ratios are medians of the ratios of each round; read those, for
milliseconds are this machine's. "extra" is the most that tensors made during a step held at a time; the largest
matrix has 9.4 MB. "not orthogonal" is ‖UUᵀ/s − I‖_F/√m of the update U: zero for an orthogonal one.

{table}

`spectrim bench optimizers` measures the same on your machine.

- torch's Muon computes in bfloat16. Where the processor has instructions for that, as here, its products run at over
  four times the rate of float32; spectrim's run in float32 throughout. On processors without them the ratios to torch's
  Muon are far larger.
- `muon` orthogonalises to 1e-3 by a float64 eigendecomposition. `muon rough` is `orthogonalize_steps=5`: at least as
  orthogonal as torch's.
- Clipping costs the Gram matrix, its inverse square root by a few inverses, and one more product.
- Spectra reads the gradient twice, momentum four times and the weights twice; fused AdamW reads each of four tensors
  once. Without a kernel of its own in C++ that is where it ends.
- The gradient is read once more than by torch, to see that it is finite before anything moves.

## Under torch.compile

The step compiles, and is not compiled again when a learning rate in a tensor changes. Under the compiler no number is
read, so operators take the forms for accelerators: on a CPU this makes clipping slower, not faster.

{compiled}
"""


def markdown(rows: Iterable[bench_optimizers.OptimizerRow]) -> str:
    lines = [bench_cli.optimizer_cells(row) for row in rows]
    header = list(lines[0])
    body = [header, ["---", *("---:" for _ in header[1:])], *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with bench_operators.threads(arguments.threads) as count:
        machine = f"CPU, {count} threads, torch {torch.__version__}, float32"
        rows = bench_optimizers.bench_optimizers(blocks=1, repeats=arguments.repeats)
        compiled = bench_optimizers.bench_optimizers(blocks=1, repeats=5, contenders=COMPILED, compiled=True)
    text = TEXT.format(
        machine=machine, repeats=arguments.repeats, table=markdown(rows), compiled=markdown(compiled)
    )  # fmt: skip
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
