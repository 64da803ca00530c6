"""The input of the benchmark of operators: seeded matrices with a named spectrum, and their exact clip."""

import torch
from torch import Tensor

from spectrim.operators.inverse_root import reference

__all__ = ["LARGEST_SVD", "exact_soft_clip", "largest_singular_value", "matrix"]

LARGEST_SVD = 1024
"""The longest smaller side for which a singular value decomposition takes seconds, not minutes."""


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
