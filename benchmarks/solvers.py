"""Writes docs/solvers.md and its picture from the benchmark of operators."""

import argparse
from pathlib import Path
from typing import get_args

import torch

from spectrim.lab.bench import bench_tables, operator_bench
from spectrim.lab.bench.settings import DtypeName, SolverName, SpectrumName, parse_shapes
from spectrim.lab.files import write_text

DOCS = Path(__file__).parent.parent / "docs"
ACCURACY_SHAPE = (256, 512)
DTYPES: list[DtypeName] = ["float32", "bfloat16"]

TEXT = """\
# Solvers of spectral clipping

<!-- Written by benchmarks/solvers.py. Edit that. -->

`soft_clip(X, c)` is (I + XXᵀ/c²)^(-1/2) X. The inverse square root costs most, and solvers differ in how they compute
it. κ = 1 + σ₁²/c² is the condition number of its argument.

| solver | what it does | error kept to |
|---|---|---|
| `rational` | Zolotarev's best rational function: κ is read, a pole costs one inverse | `tol`, for σ₁/c to 10⁴ |
| `minimax` | best odd quintics on the known interval: products alone, nothing is read | `tol`, for σ₁/c to 10³ |
| `reference` | eigenvectors of the float64 Gram matrix, or the singular value decomposition | 1e-6 and better |
| `newton_schulz` | the paper's ten coupled steps | none stated, so a `tol` is refused; see below |

`auto` is `minimax` on accelerators, under `torch.compile` and on fake tensors. On the CPU it is `reference` up to a
smaller side of 64 and `rational` beyond. `hard_clip` always takes the reference.

## What holds for every finite matrix

All but `newton_schulz` return finite numbers for every finite matrix and every threshold, raise nothing, and exceed c
by no more than 1e-5 of it, before the result is rounded to the matrix's dtype; rounding to bfloat16 changes entries by
up to 2⁻⁹ of themselves, and may add as much. A matrix that is not finite becomes NaN and leaves the others of its stack
alone.

Beyond the σ₁/c of the table the bound still holds, and accuracy is lost as follows. `rational` and `reference` stay
within `tol` until rounding of float64 shows, at σ₁/c of about 10¹². `minimax` makes singular values below σ₁/1000 too
small, and zero as σ₁/c grows; those above stay right. `benchmarks/operator_fuzz.py` draws matrices that are hard to
clip and counts exceptions, broken bounds and errors.

torch's switches for TF32, bfloat16 and autocast change none of this: products are made with them off.

## How

`rational` bounds the largest eigenvalue of the Gram matrix and takes the cheapest approximation that is accurate up to
it. For a `tol` of 1e-3 and σ₁/c up to 150 that is two poles, and one quintic step for the error that they leave.

A Gram matrix squares the condition number. In float32 the rounding of a large spike is then as large as everything near
the threshold. The bound and the first inverse tell how much rounding may have changed the result. If that is less than
`tol` allows, the result is scaled down by as much, so that no singular value exceeds c. If it is more, or the smaller
side is above 256, the spike gets rows of its own: with orthonormal columns Q, which approximate the spike, the taller
matrix [QᵀX; X − QQᵀX] is clipped and the result is put together again. That map is an isometry for every Q, so the
result is that of X, and the rounding of the spike stays in its own rows of the Gram matrix. If even that is not
accurate enough, the computation starts again in float64.

`minimax` computes the Gram matrix again every three steps at most, as the spike shrinks; for a `tol` below 5e-4 it
works in float64.

## Time

{machine}. Medians of {repeats} interleaved rounds; read ratios, not milliseconds.
The matrices resemble Adam's directions with a spike, σ₁/c = 100. "vs ten NS" and "vs SVD": how many times faster than
the paper's ten Newton-Schulz steps and than a singular value decomposition. "over c": by how much the result exceeds
its norm bound. "/ products": time over that of the two matrix products that every solver needs.

{times}

Geometric mean of `auto` against ten Newton-Schulz steps: {mean:.2f}.

## Accuracy

{accuracy_shape}, relative Frobenius error against float64 singular values; "over c" in brackets where it is not zero.

{accuracy}

![Error against κ](images/solver_errors.svg)

## Spectra's shaping

The shaped matrix is never formed. M is read four times: twice for the power step, once for the tail's norm, once for
the step itself.

{spikes}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", default="small")
    arguments = parser.parse_args()
    shapes = parse_shapes(arguments.shapes)
    solvers = list(get_args(SolverName))
    with operator_bench.threads(arguments.threads):
        rows = operator_bench.bench_operators(
            shapes, solvers=solvers, dtypes=["float32"], spectra=["adam"], repeats=arguments.repeats, progress=print
        )
        spikes = operator_bench.bench_spike(shapes, repeats=arguments.repeats)
        curves = operator_bench.error_by_kappa(solvers, DTYPES)
        accuracy = accuracy_lines(solvers)
    DOCS.joinpath("images").mkdir(parents=True, exist_ok=True)
    bench_tables.save_errors(curves, DOCS / "images" / "solver_errors.svg")
    ratios = torch.tensor([row.faster_than_newton_schulz for row in rows if row.solver == "auto"])
    text = TEXT.format(
        machine=f"CPU, {arguments.threads} threads, torch {torch.__version__}, float32",
        repeats=arguments.repeats,
        times=markdown([bench_tables.clip_cells(row) for row in rows]),
        mean=ratios.log().mean().exp().item(),
        accuracy_shape="x".join(map(str, ACCURACY_SHAPE)),
        accuracy=markdown(accuracy),
        spikes=markdown([bench_tables.spike_cells(row) for row in spikes]),
    )
    write_text(DOCS / "solvers.md", text)


def accuracy_lines(solvers: list[str]) -> list[dict[str, str]]:
    """One line for every spectrum, dtype and σ₁/c; one column for every solver."""
    lines = []
    for ratio in (1e-3, 1.0, 30.0, 1e3):
        rows = operator_bench.bench_operators(
            [ACCURACY_SHAPE],
            solvers=solvers,
            dtypes=DTYPES,
            spectra=list(get_args(SpectrumName)),
            ratio=ratio,
            repeats=1,
            progress=print,
        )
        for first in range(0, len(rows), len(solvers)):
            group = rows[first : first + len(solvers)]
            line = {"spectrum": group[0].spectrum, "dtype": group[0].dtype, "σ₁/c": f"{ratio:g}"}
            for row in group:
                over = f" ({row.bound_violation:.0e})" if row.bound_violation > 1e-6 else ""
                line[f"`{row.solver}`"] = f"{row.error:.0e}{over}"
            lines.append(line)
    return lines


def markdown(lines: list[dict[str, str]]) -> str:
    """A Markdown table of lines that share their columns."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
