"""Matrices with singular values of every kind, seeded, and hypothesis strategies that draw them."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def matrix(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix of random singular vectors and the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return (U * sigma.double()) @ V.mT


def one_spike(k: int) -> Tensor:
    sigma = torch.linspace(1.0, 0.1, k) * 1e-2
    sigma[0] = 1
    return sigma


def ten_spikes(k: int) -> Tensor:
    sigma = torch.linspace(1.0, 0.1, k) * 1e-2
    sigma[: min(10, k)] = torch.linspace(1, 0.5, min(10, k))
    return sigma


def rank_deficient(k: int) -> Tensor:
    return torch.linspace(1, 0.1, k) * (torch.arange(k) < (k + 1) // 2)


# Every spectrum has largest singular value one.
SPECTRA = {
    "flat": torch.ones,
    "geometric": lambda k: torch.logspace(0, -4, k) if k > 1 else torch.ones(1),
    "one spike": one_spike,
    "ten spikes": ten_spikes,
    "rank-deficient": rank_deficient,
    "sign": None,
}


def with_spectrum(name: str, m: int, n: int, seed: int = 0) -> Tensor:
    """A float64 matrix with the named spectrum and largest singular value one; "sign" is a random ±1 matrix, scaled."""
    if name == "sign":
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(m, n, generator=generator, dtype=torch.float64).sign()
        return X / torch.linalg.matrix_norm(X, ord=2)
    return matrix(m, n, SPECTRA[name](min(m, n)), seed)


@st.composite
def matrices(draw, largest: int = 24, stack: bool = True) -> Tensor:
    """A float32 matrix, or a small stack of them, of any shape, spectrum and scale."""
    m, n = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    count = draw(st.integers(1, 3)) if stack else 1
    each = [
        with_spectrum(draw(st.sampled_from(sorted(SPECTRA))), m, n, draw(st.integers(0, 99)))
        * 10 ** draw(st.floats(-3, 3))
        for _ in range(count)
    ]
    return torch.stack(each).float() if draw(st.booleans()) and stack else each[0].float()
