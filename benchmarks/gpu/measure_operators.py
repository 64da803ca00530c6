"""How right operators are against float64, and how long they take, under either precision of float32 products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import spectrim
from gpu.device import Device
from gpu.results import Row, rows

__all__ = ["accuracy", "matmul_precision", "times"]

RATIOS = (0.1, 10.0, 100.0, 1000.0)
"""Of the largest singular value to the threshold."""
PRECISIONS = ("highest", "high")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's precision of float32 products for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def spiky(rows: int, columns: int, device: torch.device) -> Tensor:
    """Signs with noise, as Adam's updates are, and four large directions above them."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(rows, columns, generator=g).sign() * (0.5 + torch.rand(rows, columns, generator=g))
    U, V = (torch.linalg.qr(torch.randn(size, 4, generator=g)).Q for size in (rows, columns))
    spike = 3 * (math.sqrt(rows) + math.sqrt(columns)) * torch.linspace(1.0, 0.3, 4)
    return (X + U * spike @ V.mT).to(device)


def falling(rows: int, columns: int, device: torch.device) -> Tensor:
    """Singular values that fall from 1 by a constant factor to 1e-4: all of the small ones lie far below the
    largest."""
    g = torch.Generator().manual_seed(1)
    k = min(rows, columns)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=g)).Q for size in (rows, columns))
    return (U * torch.logspace(0, -4, k) @ V.mT).to(device)


MATRICES: dict[str, Callable[[int, int, torch.device], Tensor]] = {"spiky": spiky, "falling": falling}


def clip_forms() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """The soft clip, exact and in half precision."""
    return {
        "soft_clip exact": lambda X, c: spectrim.soft_clip(X, c, precision="exact"),
        "soft_clip half": lambda X, c: spectrim.soft_clip(X, c, precision="half"),
    }


def polar_forms() -> dict[str, Callable[[Tensor], Tensor]]:
    """The polar factor likewise, converged and after five steps; and what torch's Muon does."""
    return {
        "orthogonalize exact": lambda X: spectrim.orthogonalize(X, precision="exact"),
        "orthogonalize exact, 5 steps": lambda X: spectrim.orthogonalize(X, steps=5, precision="exact"),
        "torch.Muon's 5 steps": torch_steps,
        "orthogonalize half": lambda X: spectrim.orthogonalize(X, precision="half"),
        "orthogonalize half, 5 steps": lambda X: spectrim.orthogonalize(X, steps=5, precision="half"),
    }


def accuracy(device: Device) -> Iterator[Row]:
    """Relative errors against float64 SVD, and by how much the largest singular value exceeds its bound."""
    shapes = [(160, 224)] if device.small else [(768, 768), (768, 3072), (3072, 768), (2048, 2048)]

    def cases() -> Iterator[tuple[Row, Callable[[], Row]]]:
        for m, n in shapes:
            for kind, make in MATRICES.items():
                X = make(m, n, device.torch)
                U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
                for setting in PRECISIONS:
                    names = {"shape": [m, n], "matrix": kind, "products": setting}
                    for label, clip in clip_forms().items():
                        for ratio in RATIOS:
                            c = S[0].item() / ratio
                            exact = (U * (S / torch.sqrt(1 + (S / c) ** 2))) @ Vh
                            yield (
                                {**names, "operator": label, "ratio": ratio},
                                lambda clip=clip, c=c, exact=exact, setting=setting, X=X: clipped(
                                    clip, X, c, exact, setting
                                ),
                            )
                    for label, polar in polar_forms().items():
                        yield (
                            {**names, "operator": label, "ratio": (S[0] / S[-1]).item()},
                            lambda polar=polar, exact=U @ Vh, setting=setting, X=X: orthogonal(
                                polar, X, exact, setting
                            ),
                        )

    yield from rows(device, cases())


def clipped(clip: Callable[..., Tensor], X: Tensor, c: float, exact: Tensor, setting: str) -> Row:
    with matmul_precision(setting):
        found = clip(X, c).double()
    excess = (torch.linalg.matrix_norm(found, 2) / c - 1).item() if found.isfinite().all() else math.nan
    return {"error": relative_error(found, exact), "excess": max(excess, 0.0)}


def orthogonal(polar: Callable[[Tensor], Tensor], X: Tensor, exact: Tensor, setting: str) -> Row:
    with matmul_precision(setting):
        found = polar(X).double()
    values = torch.linalg.svdvals(found)
    return {"error": relative_error(found, exact), "least": values[-1].item(), "largest": values[0].item()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def torch_steps(X: Tensor) -> Tensor:
    """What torch's Muon does to a matrix."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    result: Tensor = _zeropower_via_newtonschulz(X, (3.4445, -4.775, 2.0315), 5, 1e-7)
    return result


def times(device: Device) -> Iterator[Row]:
    """Milliseconds of every operator on one matrix, or a stack."""
    shapes: list[tuple[int, ...]] = [(160, 224)]
    if not device.small:
        shapes = [(768, 768), (12, 768, 768), (768, 3072), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336)]

    def cases() -> Iterator[tuple[Row, Callable[[], Row]]]:
        for setting in PRECISIONS:
            for shape in shapes:
                X = torch.randn(shape, device=device.torch)
                for label, work in operator_forms(X).items():
                    yield (
                        {"shape": list(shape), "products": setting, "operator": label},
                        lambda work=work, setting=setting: timed(device, work, setting),
                    )

    yield from rows(device, cases())


def operator_forms(X: Tensor) -> dict[str, Callable[[], Any]]:
    half = X.half()
    found: dict[str, Callable[[], Any]] = {}
    for label, clip in clip_forms().items():
        found[label] = lambda clip=clip: clip(X, 5.0)
    for label, polar in polar_forms().items():
        if "torch" not in label or X.ndim == 2:
            found[label] = lambda polar=polar: polar(X)
    return found | {"X Xᵀ X": lambda: (X @ X.mT) @ X, "X Xᵀ X in float16": lambda: (half @ half.mT) @ half}


def timed(device: Device, work: Callable[[], Any], setting: str) -> Row:
    with matmul_precision(setting):
        return {"ms": device.ms(work, seconds=0.3)}
