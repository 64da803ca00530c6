"""The benchmark of operators: accuracy, time, arithmetic and traffic of every way to clip, on shapes of real models.

Errors are against float64. Times are medians of rounds in which the contenders take turns, so that a busy machine
slows all of them; read the ratios, not the milliseconds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spectrim.lab.errors import LabError
from spectrim.operators import Solver, soft_clip, spike_correction, track_spike
from spectrim.operators.inverse_root import reference

__all__ = [
    "DTYPES",
    "SHAPE_SETS",
    "SOLVERS",
    "SPECTRA",
    "OperatorRow",
    "SpikeRow",
    "bench_operators",
    "bench_spike",
    "error_by_kappa",
    "matrix",
    "parse_shapes",
]

SHAPE_SETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "small": ((768, 768), (768, 3072), (1024, 4096), (2048, 2048)),
    "gpt2-small": ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    "llama-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "moe": ((64, 1024, 2048), (64, 2048, 1024)),
}
SOLVERS: tuple[str, ...] = get_args(Solver)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SPECTRA = ("adam", "flat", "geometric", "one-spike", "ten-spikes", "rank-deficient", "sign")
LARGEST_SVD = 1024  # smaller side up to which a singular value decomposition is waited for
PASS_RANK_RATIO = 0.015  # the rank that Spectra follows, as a share of the smaller side


@dataclass(frozen=True, kw_only=True)
class OperatorRow:
    """One way to clip one stack of matrices; the ratios say how many times faster than each yardstick it is."""

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
    solvers: list[str],
    dtypes: list[str],
    spectra: list[str],
    ratio: float = 100.0,
    device: str = "cpu",
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> list[OperatorRow]:
    """Measure every solver on every shape, spectrum and dtype; c is σ₁/ratio."""
    rows = []
    for shape in shapes:
        for spectrum in spectra:
            progress(f"{'x'.join(map(str, shape))} {spectrum}: exact result")
            X64 = matrix(spectrum, shape, device)
            c = 1 / ratio
            for dtype in dtypes:
                X = X64.to(DTYPES[dtype])
                exact = exact_soft_clip(X, c)
                progress(f"{'x'.join(map(str, shape))} {spectrum} {dtype}: timing")
                rows += _rows(X, c, exact, shape, spectrum, ratio, dtype, solvers, repeats)
    return rows


def _rows(
    X: Tensor,
    c: float,
    exact: Tensor,
    shape: tuple[int, ...],
    spectrum: str,
    ratio: float,
    dtype: str,
    solvers: list[str],
    repeats: int,
) -> list[OperatorRow]:
    wide = X if X.shape[-2] <= X.shape[-1] else X.mT
    tasks: dict[str, Callable[[], Tensor]] = {
        "newton_schulz": lambda: soft_clip(X, c, solver="newton_schulz"),
        "two products": lambda: (wide @ wide.mT) @ wide,
    }
    if min(X.shape[-2:]) <= LARGEST_SVD:
        tasks["svd"] = lambda: torch.linalg.svd(X.to(exact.dtype if dtype == "float64" else torch.float32), False)[0]
    for solver in solvers:
        tasks[solver] = lambda solver=solver: soft_clip(X, c, solver=solver)  # type: ignore[misc]
    times = interleaved(tasks, repeats)
    size = torch.linalg.matrix_norm(exact)
    rows = []
    for solver in solvers:
        with Counter() as counter:
            clipped = soft_clip(X, c, solver=solver).double()  # type: ignore[arg-type]
        error = (torch.linalg.matrix_norm(clipped - exact) / size).amax().item()
        norm = largest_singular_value(clipped)
        row = OperatorRow(
            shape=shape,
            spectrum=spectrum,
            ratio=ratio,
            dtype=dtype,
            solver=solver,
            error=error,
            bound_violation=max(0.0, norm / c - 1),
            milliseconds=times[solver] * 1e3,
            faster_than_newton_schulz=times["newton_schulz"] / times[solver],
            faster_than_svd=times["svd"] / times[solver] if "svd" in times else None,
            times_two_products=times[solver] / times["two products"],
            gigaflops=counter.flops / 1e9,
            megabytes=counter.bytes / 1e6,
        )
        rows.append(row)
    return rows


def bench_spike(
    shapes: list[tuple[int, ...]], *, device: str = "cpu", repeats: int = 5, rank_ratio: float = PASS_RANK_RATIO
) -> list[SpikeRow]:
    """Time Spectra's update of X from M: follow the spike, shape it, X ← M times a scalar plus a rank-k correction."""
    rows = []
    for shape in shapes:
        M = matrix("adam", shape, device).float()
        X = torch.zeros_like(M)
        rank = max(1, round(rank_ratio * min(shape[-2:])))
        V = track_spike(M, None, rank=rank).V
        spike = track_spike(M, V)
        correction = spike_correction(M, spike)

        def apply(X: Tensor = X, M: Tensor = M, U: Tensor = correction.U, right: Tensor = correction.right) -> Tensor:
            return X.add_(M, alpha=-1e-3).sub_((U * 1e-3) @ right.mT)

        times = interleaved(
            {
                "track": lambda M=M, V=V: track_spike(M, V).V,  # type: ignore[misc]
                "shape": lambda M=M, spike=spike: spike_correction(M, spike).norm,  # type: ignore[misc]
                "apply": apply,
                "pass": lambda X=X, M=M: X.add_(M, alpha=-1e-3),  # type: ignore[misc]
            },
            repeats,
        )
        milliseconds = {name: seconds * 1e3 for name, seconds in times.items()}
        rows.append(
            SpikeRow(
                shape=shape,
                rank=rank,
                track_milliseconds=milliseconds["track"],
                shape_milliseconds=milliseconds["shape"],
                apply_milliseconds=milliseconds["apply"],
                pass_milliseconds=milliseconds["pass"],
                times_passes=(times["track"] + times["shape"] + times["apply"]) / times["pass"],
            )
        )
    return rows


def error_by_kappa(
    solvers: list[str],
    dtypes: list[str],
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
                clipped = soft_clip(X, c, solver=solver).double()  # type: ignore[arg-type]
                error = torch.linalg.matrix_norm(clipped - exact) / torch.linalg.matrix_norm(exact)
                curves.setdefault((solver, dtype), []).append((1 + c**-2, error.item()))
    return curves


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """The shapes of a set by name, or of a list such as 768x3072,8x512x512."""
    if text in SHAPE_SETS:
        return list(SHAPE_SETS[text])
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if not 2 <= len(sizes) <= 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise LabError(f"shapes {part!r}: expected {', '.join(SHAPE_SETS)}, or sizes such as 768x3072 or 8x512x512")
        shapes.append(tuple(map(int, sizes)))
    return shapes


def matrix(spectrum: str, shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> Tensor:
    """A float64 stack of seeded matrices of largest singular value one with the named spectrum.

    "adam" is an Adam-like direction: entries in [-1, 1], ten directions far above a random bulk. "sign" is random
    signs.
    """
    generator = torch.Generator().manual_seed(seed)
    m, n = shape[-2:]
    k = min(m, n)
    if spectrum in ("adam", "sign"):
        X = torch.randn(shape, generator=generator)
        if spectrum == "adam":
            left = torch.randn(*shape[:-1], 10, generator=generator) * torch.logspace(0.5, -0.5, 10)
            X = torch.tanh(X + 0.5 * left @ torch.randn(*shape[:-2], 10, n, generator=generator))
        else:
            X = X.sign()
        X = X.to(device).double()
        normed: Tensor = X / largest_singular_values(X)[..., None, None]
        return normed
    place = torch.arange(k) / max(k - 1, 1)
    sigma = {
        "flat": torch.ones(k),
        "geometric": 10 ** (-4 * place),
        "one-spike": torch.where(torch.arange(k) < 1, 1.0, 1e-2 * (1 - 0.9 * place)),
        "ten-spikes": torch.where(torch.arange(k) < 10, 1 - torch.arange(k) / 20, 1e-2 * (1 - 0.9 * place)),
        "rank-deficient": (1 - 0.9 * place) * (torch.arange(k) < (k + 1) // 2),
    }[spectrum]
    U = torch.linalg.qr(torch.randn(*shape[:-1], k, generator=generator, dtype=torch.float64).to(device)).Q
    V = torch.linalg.qr(torch.randn(*shape[:-2], n, k, generator=generator, dtype=torch.float64).to(device)).Q
    made: Tensor = (U * sigma.to(device)) @ V.mT
    return made


def exact_soft_clip(X: Tensor, c: float) -> Tensor:
    """The result in float64: by singular values, or by the Gram matrix where these would take minutes."""
    X = X.double()
    if min(X.shape[-2:]) > LARGEST_SVD:
        tall = X.shape[-2] > X.shape[-1]
        exact = reference(X.mT if tall else X, X.new_full((1, 1), c), 1e-6)
        return exact.mT if tall else exact
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    clipped: Tensor = (U * (sigma / (1 + (sigma / c).square()).sqrt())[..., None, :]) @ Vh
    return clipped


def largest_singular_values(X: Tensor) -> Tensor:
    """σ₁ of every matrix of a stack, from the eigenvalues of the smaller Gram matrix."""
    gram = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues[..., -1].clamp_min(0).sqrt()


def largest_singular_value(X: Tensor) -> float:
    """The largest σ₁ of a stack."""
    return largest_singular_values(X).amax().item()


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


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations of products and decompositions, and bytes that operations read and write.

    Decompositions by LAPACK's conventional counts: Cholesky n³/3, its inverse 2n³/3, QR 4mk² − 4k³/3, symmetric
    eigenvectors 9n³. Every operation that is not a view reads its arguments and writes its results once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name == "_unsafe_view":
            return out
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif name == "mkldnn::_linear_pointwise":
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        elif name in DECOMPOSITIONS:
            *stack, m, n = args[0].shape
            self.flops += math.prod(stack) * DECOMPOSITIONS[name](m, n)
        return out


DECOMPOSITIONS: dict[str, Callable[[int, int], float]] = {
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
    "cholesky_inverse": lambda m, n: 2 * n**3 / 3,
    "linalg_qr": lambda m, n: 4 * m * min(m, n) ** 2 - 4 * min(m, n) ** 3 / 3,
    "_linalg_eigh": lambda m, n: 9 * n**3,
}


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with this many CPU threads, or with as many as there are; gives the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
