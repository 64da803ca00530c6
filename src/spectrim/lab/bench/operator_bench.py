"""The benchmark of operators: accuracy, time, arithmetic and memory traffic of every solver on shapes of real models.
Errors are against float64. Times are medians of interleaved rounds, so that a busy machine slows all contenders; read
the ratios, not the milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from spectrim.lab.bench.counting import Counter
from spectrim.lab.bench.matrices import LARGEST_SVD, exact_soft_clip, largest_singular_value, matrix
from spectrim.lab.bench.settings import DtypeName, SolverName, SpectrumName
from spectrim.operators import soft_clip, spike_correction, track_spike

__all__ = [
    "OperatorRow",
    "SpikeRow",
    "bench_operators",
    "bench_spike",
    "error_by_kappa",
]

DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
PASS_RANK_RATIO = 0.015  # the rank that Spectra follows, as a share of the smaller side


@dataclass(frozen=True, kw_only=True)
class OperatorRow:
    """One solver on one stack of matrices; ratios are speedups over each reference."""

    shape: tuple[int, ...]
    spectrum: str
    ratio: float  # σ₁/c
    dtype: str
    solver: str
    error: float
    bound_violation: float
    milliseconds: float
    faster_than_newton_schulz: float
    faster_than_svd: float | None
    times_two_products: float
    gigaflops: float
    megabytes: float


@dataclass(frozen=True, kw_only=True)
class SpikeRow:
    """Spectra's shaping and step on one matrix, against one read and write of it."""

    shape: tuple[int, ...]
    rank: int
    track_milliseconds: float
    shape_milliseconds: float
    apply_milliseconds: float
    pass_milliseconds: float
    times_passes: float


def bench_operators(
    shapes: list[tuple[int, ...]],
    *,
    solvers: Sequence[SolverName],
    dtypes: Sequence[DtypeName],
    spectra: Sequence[SpectrumName],
    ratio: float = 100.0,
    device: str = "cpu",
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> list[OperatorRow]:
    """Measure every solver on every shape, spectrum and dtype; c is σ₁/ratio."""
    rows = []
    for shape, spectrum in product(shapes, spectra):
        progress(f"{'x'.join(map(str, shape))} {spectrum}: exact result")
        X64 = matrix(spectrum, shape, device)
        for dtype in dtypes:
            X = X64.to(DTYPES[dtype])
            exact = exact_soft_clip(X, 1 / ratio)
            progress(f"{'x'.join(map(str, shape))} {spectrum} {dtype}: timing")
            times = interleaved(clips(X, 1 / ratio, solvers), repeats)
            for solver in solvers:
                measured = clip_numbers(X, 1 / ratio, exact, solver, times)
                rows.append(OperatorRow(shape=shape, spectrum=spectrum, ratio=ratio, dtype=dtype, **measured))
    return rows


def clips(X: Tensor, c: float, solvers: Sequence[SolverName]) -> dict[str, Callable[[], Tensor]]:
    """The clip by every solver, and what it is compared with."""
    wide = X if X.shape[-2] <= X.shape[-1] else X.mT
    tasks: dict[str, Callable[[], Tensor]] = {
        "newton_schulz": lambda: soft_clip(X, c, solver="newton_schulz"),
        "two products": lambda: (wide @ wide.mT) @ wide,
    }
    if min(X.shape[-2:]) <= LARGEST_SVD:
        dtype = torch.promote_types(X.dtype, torch.float32)
        tasks["svd"] = lambda: torch.linalg.svd(X.to(dtype), False)[0]
    return tasks | {solver: partial(soft_clip, X, c, solver=solver) for solver in solvers}


def clip_numbers(X: Tensor, c: float, exact: Tensor, solver: SolverName, times: dict[str, float]) -> dict[str, Any]:
    """Error, speed and arithmetic of one solver."""
    with Counter() as counter:
        clipped = soft_clip(X, c, solver=solver).double()
    error = torch.linalg.matrix_norm(clipped - exact) / torch.linalg.matrix_norm(exact)
    return {
        "solver": solver,
        "error": error.amax().item(),
        "bound_violation": max(0.0, largest_singular_value(clipped) / c - 1),
        "milliseconds": times[solver] * 1e3,
        "faster_than_newton_schulz": times["newton_schulz"] / times[solver],
        "faster_than_svd": times["svd"] / times[solver] if "svd" in times else None,
        "times_two_products": times[solver] / times["two products"],
        "gigaflops": counter.flops / 1e9,
        "megabytes": counter.bytes / 1e6,
    }


def bench_spike(
    shapes: list[tuple[int, ...]], *, device: str = "cpu", repeats: int = 5, rank_ratio: float = PASS_RANK_RATIO
) -> list[SpikeRow]:
    """Time Spectra's update of X from M: track the spike, shape it, X ← M times a scalar plus a rank-k correction."""
    rows = []
    for shape in shapes:
        M = matrix("adam", shape, device).float()
        X = torch.zeros_like(M)
        rank = max(1, round(rank_ratio * min(shape[-2:])))
        V = track_spike(M, None, rank=rank).V
        spike = track_spike(M, V)
        correction = spike_correction(M, spike)

        times = interleaved(
            {
                "track": lambda M=M, V=V: track_spike(M, V).V,  # type: ignore[misc]
                "shape": lambda M=M, spike=spike: spike_correction(M, spike).norm,  # type: ignore[misc]
                "apply": partial(apply, X, M, correction.U, correction.right),
                "pass": partial(X.add_, M, alpha=-1e-3),
            },
            repeats,
        )
        rows.append(
            SpikeRow(
                shape=shape,
                rank=rank,
                track_milliseconds=times["track"] * 1e3,
                shape_milliseconds=times["shape"] * 1e3,
                apply_milliseconds=times["apply"] * 1e3,
                pass_milliseconds=times["pass"] * 1e3,
                times_passes=(times["track"] + times["shape"] + times["apply"]) / times["pass"],
            )
        )
    return rows


def apply(X: Tensor, M: Tensor, U: Tensor, right: Tensor) -> Tensor:
    return X.add_(M, alpha=-1e-3).sub_((U * 1e-3) @ right.mT)


def error_by_kappa(
    solvers: Sequence[SolverName],
    dtypes: Sequence[DtypeName],
    *,
    spectrum: str = "ten-spikes",
    shape: tuple[int, int] = (256, 512),
    device: str = "cpu",
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(κ, relative error) for every solver and dtype, κ = 1 + σ₁²/c² from 2 to 10⁶."""
    X64 = matrix(spectrum, shape, device)
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for dtype in dtypes:
        X = X64.to(DTYPES[dtype])
        for exponent in range(13):
            c = 10 ** (-exponent / 4)
            exact = exact_soft_clip(X, c)
            for solver in solvers:
                clipped = soft_clip(X, c, solver=solver).double()
                error = torch.linalg.matrix_norm(clipped - exact) / torch.linalg.matrix_norm(exact)
                curves.setdefault((solver, dtype), []).append((1 + c**-2, error.item()))
    return curves


def interleaved(tasks: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """The median seconds of every task; each round runs all of them once, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            result = task()
            if result.device.type != "cpu":
                torch.accelerator.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with this many CPU threads, or with the present number, which it yields."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
