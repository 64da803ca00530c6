"""How accurate the operators for GPUs are in half precision, told by a CPU, which rounds the same but takes longer.

    python benchmarks/half_precision.py [--shapes 256x256,768x1536] [--json results.json]

The soft clip against the singular value decomposition in float64: the relative Frobenius error, and by how much the
largest singular value exceeds c, for σ₁/c from 10 to a million. The polar factor: ‖OOᵀ − I‖_F/√m and its singular
values, beside those of torch.optim.Muon's five steps in bfloat16. Under two minutes with the default shapes.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from spectrim.operators.half import half_clip, half_polar

RATIOS = (10, 100, 1e3, 1e4, 1e6)
MUON = (3.4445, -4.7750, 2.0315), 5, 1e-7  # as torch.optim.Muon calls it


def spectra(m: int) -> dict[str, Tensor]:
    """Singular values, the largest one."""
    index = torch.arange(m, dtype=torch.float64)
    bulk = torch.linspace(1, 0.1, m, dtype=torch.float64)
    return {
        "flat": torch.ones(m, dtype=torch.float64),
        "10 over a bulk of 1e-2": torch.where(index < 10, 1.0, 1e-2 * bulk),
        "a tenth over a bulk of 1e-4": torch.where(index < m // 10, 1.0, 1e-4 * bulk),
        "half over nothing": (index < m // 2).double(),
        "power law": 1 / (index + 1),
        "geometric to 1e-4": torch.logspace(0, -4, m, dtype=torch.float64),
    }


def orthonormal(m: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q


def matrices(m: int, n: int) -> dict[str, Tensor]:
    """Stacks of one float32 matrix each, of largest singular value about one."""
    generator = torch.Generator().manual_seed(0)
    U, V = orthonormal(m, m, generator), orthonormal(n, m, generator)
    found = {name: (U * sigma) @ V.mT for name, sigma in spectra(m).items()}
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64)
    found["rank one and noise"] = U[:, :1] @ V[:, :1].mT + 1e-3 * noise / (m**0.5 + n**0.5)
    # Like Adam's direction: every entry of size one, and what most entries agree on in a few directions.
    few = noise + 2 * (m * n) ** 0.5 * U[:, :4] @ torch.diag(torch.tensor([1, 0.5, 0.2, 0.1]).double()) @ V[:, :4].mT
    signs = few.sign()
    found["signs, four directions"] = signs / torch.linalg.eigvalsh(signs @ signs.mT)[-1].sqrt()
    return {name: X[None].float() for name, X in found.items()}


def clip_row(X: Tensor) -> list[dict[str, float]]:
    U, sigma, Vh = torch.linalg.svd(X[0].double(), full_matrices=False)
    row = []
    for ratio in RATIOS:
        c = sigma[0].item() / ratio
        exact = (U * (sigma / (1 + (sigma / c) ** 2).sqrt())) @ Vh
        O = half_clip([X], [c])[0][0].double()  # noqa: E741
        error = torch.linalg.matrix_norm(O - exact) / torch.linalg.matrix_norm(exact)
        largest = torch.linalg.eigvalsh(O @ O.mT)[-1].sqrt()
        row.append({"ratio": ratio, "error": error.item(), "excess": max(0.0, largest.item() / c - 1)})
    return row


def polar_row(X: Tensor) -> dict[str, dict[str, float]]:
    results = {
        "torch's Muon": _zeropower_via_newtonschulz(X[0], *MUON),
        "five steps": half_polar([X], steps=5)[0][0],
        "accurate": half_polar([X])[0][0],
    }
    row = {}
    for name, O in results.items():  # noqa: E741
        values = torch.linalg.eigvalsh(O.double() @ O.double().mT).clamp_min(0)
        row[name] = {
            "off": (values - 1).square().mean().sqrt().item(),
            "least": values[0].sqrt().item(),
            "largest": values[-1].sqrt().item(),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="256x256,768x1536", help="m x n, m at most n, separated by commas")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    started, results = time.perf_counter(), []
    for shape in arguments.shapes.split(","):
        m, n = map(int, shape.split("x"))
        made = matrices(m, n)
        print(f"\nsoft clip, {shape}: error (and excess over c, in %) at σ₁/c")
        print(f"{'':29}" + "".join(f"{ratio:>17,.0f}" for ratio in RATIOS))
        for name, X in made.items():
            row = clip_row(X)
            print(f"{name:29}" + "".join(f"{cell['error']:9.1e} ({100 * cell['excess']:4.2f})" + " " for cell in row))
            results.append({"operator": "soft clip", "shape": [m, n], "spectrum": name, "cells": row})
        print(f"\npolar factor, {shape}: ‖OOᵀ − I‖_F/√m [least and largest singular value]")
        for name, X in made.items():
            columns = polar_row(X)
            cells = [f"{who} {v['off']:.3f} [{v['least']:.3f}, {v['largest']:.3f}]" for who, v in columns.items()]
            print(f"{name:29}" + "   ".join(cells))
            results.append({"operator": "polar factor", "shape": [m, n], "spectrum": name, **columns})
    print(f"\n{time.perf_counter() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
