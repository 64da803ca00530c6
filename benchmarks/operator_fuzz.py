"""Draws matrices that are hard to clip and counts what the exact operators get wrong: every count should be zero.

    python benchmarks/operator_fuzz.py --draws 6000 --seed 0

raised: an exception. lost: a result that is not finite, or not NaN for a matrix that is not finite. exceeded: a
singular value above the threshold by more than 1e-5 of it and the rounding to the matrix's dtype. inaccurate: a
relative Frobenius error, against float64 singular values, of more than 1e-3 and that rounding, where σ₁/c is at most
the operator's reach.
"""

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from spectrim.operators import hard_clip, orthogonalize, soft_clip

REACHES = {"minimax": 1e3, "float64 minimax": 1e3}
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SIDES = (1, 2, 3, 8, 17, 33, 64, 65, 66, 80, 96, 97, 128, 130, 160, 193, 200)


def soft(sigma: Tensor, c: Tensor) -> Tensor:
    less, more = torch.minimum(sigma, c), torch.maximum(sigma, c)
    return less / torch.hypot(torch.ones_like(less), less / more)


def draw_spectrum(k: int, rng: random.Random) -> Tensor:
    """Singular values in units of c, most with few large ones above a bulk."""
    top = 10 ** rng.choice([rng.uniform(-3, 1), rng.uniform(0, 4), rng.uniform(2, 4), rng.uniform(4, 12)])
    kind = rng.randrange(9)
    steps = torch.rand(k, dtype=torch.float64)
    bulk = 10 ** rng.choice([rng.uniform(-8, 2), rng.uniform(-1, 1), 0.0]) * (0.5 + steps)
    few = min(k, rng.choice([1, 1, 2, 3, 5, 10, 15, 16, 17, 25, 40]))
    if kind < 5:  # few large values over a bulk: all alike, falling slowly, or over decades
        large = [
            torch.full((few,), top),
            top * (0.1 + 0.9 * steps[:few]),
            top * 10 ** (-rng.uniform(0, 6) * steps[:few]),
        ]
        bulk[:few] = rng.choice(large)
        return bulk
    if kind == 5:  # decades, evenly
        return top * torch.logspace(0, -rng.uniform(0.1, 9), k, dtype=torch.float64)
    if kind == 6:  # low rank
        return top * (0.1 + steps) * (torch.arange(k) < few)
    if kind == 7:  # power law
        return top * torch.arange(1, k + 1, dtype=torch.float64) ** -rng.uniform(0.2, 4)
    return top * (1 + 1e-3 * steps)  # flat


def draw(rng: random.Random, largest: int) -> tuple[Tensor, float]:
    """A float64 matrix, and the threshold in whose units its spectrum was drawn."""
    sides = [side for side in SIDES if side <= largest]
    m, n = rng.choice(sides), rng.choice(sides)
    kind = rng.randrange(8)
    if kind == 0:
        X = torch.ones(m, n, dtype=torch.float64) * 10 ** rng.uniform(-2, 5)
    elif kind == 1:
        g = torch.randn(m, n, dtype=torch.float64)
        X = 10 ** rng.uniform(-6, 1) * g + 10 ** rng.uniform(0, 5) * torch.outer(g[:, 0], g[0])
    elif kind == 2:
        X = torch.randn(m, n, dtype=torch.float64).sign() * 10 ** rng.uniform(-2, 4)
        X[torch.rand(m, n) < rng.choice([0.0, 0.5, 0.99])] = 0
    else:
        k = min(m, n)
        U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
        if rng.random() < 0.2:  # along the axes
            U, V = torch.eye(m, k, dtype=torch.float64), torch.eye(n, k, dtype=torch.float64)
        X = (U * draw_spectrum(k, rng)) @ V.mT
    return X, 1.0


def operators(c: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """By name: an operator, and what it does to singular values in float64."""
    columns = c.double()[:, None]
    clips: dict[str, Callable[[Tensor], Tensor]] = {
        "soft_clip": lambda X: soft_clip(X, c, precision="exact"),
        "soft_clip at tol=1e-6": lambda X: soft_clip(X, c, tol=1e-6),
        "reference": lambda X: soft_clip(X, c, solver="reference"),
        "rational": lambda X: soft_clip(X, c, solver="rational"),
        "minimax": lambda X: soft_clip(X, c, solver="minimax"),
        "float64 minimax": lambda X: soft_clip(X, c, solver="minimax", tol=1e-6),
    }
    found = {name: (clip, lambda sigma: soft(sigma, columns)) for name, clip in clips.items()}
    found["hard_clip"] = (lambda X: hard_clip(X, c), lambda sigma: torch.minimum(sigma, columns))
    return found


def examine(X: Tensor, c: Tensor, count: Counter[str], worst: dict[str, list[float]], label: str) -> None:
    """Every operator on one stack (E, m, n) with thresholds (E,)."""
    finite = X.isfinite().all(-1).all(-1)
    exact = torch.where(finite[:, None, None], X.double(), 0.0)
    unit = exact.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    U, sigma, Vh = torch.linalg.svd(exact / unit, full_matrices=False)
    sigma = sigma * unit[..., 0]
    rounding = ROUNDING[X.dtype]
    # Thresholds and results below the normal numbers of a dtype have few digits.
    digits = torch.finfo(X.dtype).tiny / torch.finfo(X.dtype).eps * (1e3 if X.dtype != torch.float16 else 1.0)
    for name, (operator, image) in operators(c).items():
        reach = REACHES.get(name, 1e4)
        try:
            result = operator(X)
        except Exception as error:  # whatever it is, it counts
            count[f"{name}: raised"] += 1
            print(f"{name} raised {type(error).__name__} on {label}: {str(error)[:200]}")
            continue
        for i in range(len(X)):
            count[f"{name}: tried"] += 1
            if result[i].isfinite().all() != finite[i] or not (finite[i] or result[i].isnan().all()):
                count[f"{name}: lost"] += 1
                print(f"{name} lost {label}")
                continue
            if not finite[i]:
                continue
            expected = (U[i] * image(sigma)[i]) @ Vh[i]
            got, threshold = result[i].double(), c[i].item()
            over = float(torch.linalg.matrix_norm(got / max(threshold, 5e-324), 2)) - 1
            scale = expected.abs().max().clamp_min(5e-324)
            size = torch.linalg.matrix_norm(expected / scale)
            error = (
                float(torch.linalg.matrix_norm((got - expected) / scale) / size) if size > 0 else float(got.abs().max())
            )
            small = min(threshold, float(sigma[i, 0])) < digits
            ratio = float(sigma[i, 0]) / threshold
            if not (small or rounding):
                worst.setdefault(name, [0.0, 0.0, 0.0])[0] = max(worst[name][0] if name in worst else 0.0, over)
                slot = 1 if ratio <= reach else 2
                worst[name][slot] = max(worst[name][slot], error)
            allowed = 1e-5 + 2 * rounding + (1.0 if small else 0.0)
            if not over <= allowed:
                count[f"{name}: exceeded"] += 1
                print(f"{name} exceeded by {over:.1e}: {label}, σ₁/c {ratio:.1e}")
            bound = (1e-6 if "1e-6" in name or name == "float64 minimax" else 1e-3) + rounding + 1e-7
            if not small and ratio <= reach and not error <= bound:
                count[f"{name}: inaccurate"] += 1
                print(f"{name} inaccurate by {error:.1e}: {label}, σ₁/c {ratio:.1e}")


def examine_polar(X: Tensor, count: Counter[str], label: str) -> None:
    """The polar factor: bounded, finite, and right where no singular value is near what counts as zero."""
    finite = X.isfinite().all(-1).all(-1)
    for solver in ("auto", "minimax"):
        try:
            polar = orthogonalize(X, precision="exact" if solver == "auto" else "auto", solver=solver)
        except Exception as error:
            count[f"orthogonalize {solver}: raised"] += 1
            print(f"orthogonalize raised {type(error).__name__} on {label}: {str(error)[:200]}")
            continue
        for i in range(len(X)):
            count[f"orthogonalize {solver}: tried"] += 1
            if polar[i].isfinite().all() != finite[i]:
                count[f"orthogonalize {solver}: lost"] += 1
                print(f"orthogonalize {solver} lost {label}")
            if not finite[i]:
                continue
            rounding = ROUNDING[X.dtype]
            over = float(torch.linalg.matrix_norm(polar[i].double(), 2)) - 1
            if not over <= 1e-5 + 2 * rounding:
                count[f"orthogonalize {solver}: exceeded"] += 1
                print(f"orthogonalize {solver} exceeded by {over:.1e}: {label}")
            unit = X[i].double().abs().max().clamp_min(5e-324)
            U, sigma, Vh = torch.linalg.svd(X[i].double() / unit, full_matrices=False)
            eps = torch.finfo(torch.float64 if X.dtype == torch.float64 else torch.float32).eps
            floor = max(X.shape[-2:]) * eps * sigma[0]
            reach = 1e-3 if solver == "minimax" else 0.0
            if sigma[0] > 0 and not (((sigma > floor / 3) & (sigma < 3 * floor)).any() or sigma[-1] < reach * sigma[0]):
                kept = (sigma > floor).double()
                error = float(torch.linalg.matrix_norm(polar[i].double() - (U * kept) @ Vh) / kept.sum().sqrt())
                if not error <= 1e-3 + rounding:
                    count[f"orthogonalize {solver}: inaccurate"] += 1
                    print(f"orthogonalize {solver} inaccurate by {error:.1e}: {label}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=200, help="of the sides")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    count: Counter[str] = Counter()
    worst: dict[str, list[float]] = {}
    begun = time.perf_counter()
    for i in range(arguments.draws):
        seed = rng.randrange(2**31)
        each = random.Random(seed)
        torch.manual_seed(seed)
        matrices = [draw(each, arguments.largest)[0]]
        matrices += [
            draw(each, arguments.largest)[0][: matrices[0].shape[0], : matrices[0].shape[1]]
            for _ in range(each.choice([0, 0, 0, 1, 2]))
        ]
        matrices = [matrix for matrix in matrices if matrix.shape == matrices[0].shape]
        dtype = each.choice([torch.float32] * 6 + [torch.float64, torch.float64, torch.bfloat16, torch.float16])
        exponents = {torch.float64: 300, torch.float16: 4}.get(dtype, 37)
        scales = [
            10 ** each.choice([0.0, 0.0, each.uniform(-3, 3), each.uniform(-exponents, exponents)]) for _ in matrices
        ]
        info = torch.finfo(dtype)
        X = torch.stack([(a * s).clamp(info.min, info.max).to(dtype) for a, s in zip(matrices, scales, strict=True)])
        c = torch.tensor(scales, dtype=torch.float64)
        c = c if dtype == torch.float64 else c.clamp(1e-45, 3e38).float()
        if each.random() < 0.02:
            X[0, 0, 0] = each.choice([math.nan, math.inf, -math.inf])
        if each.random() < 0.02:
            X[-1] = 0
        label = f"draw {i} (seed {seed}), {dtype}, {tuple(X.shape)}"
        examine(X, c, count, worst, label)
        examine_polar(X, count, label)
    for name in sorted(count):
        print(f"{name:40} {count[name]:8}")
    print(f"\n{'worst':24} {'over c':>10} {'error':>10} {'beyond the reach':>18}")
    for name, figures in worst.items():
        print(f"{name:24} {figures[0]:10.1e} {figures[1]:10.1e} {figures[2]:18.1e}")
    print(f"{arguments.draws} draws in {time.perf_counter() - begun:.0f} s")
    if any(count[name] for name in count if not name.endswith("tried")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
