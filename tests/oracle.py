"""What the operators should return, from the float64 singular value decomposition, as close to the formulas as code can
be. No product code imports this.
"""

import torch
from torch import Tensor


def on_singular_values(X: Tensor, function) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return U @ (function(sigma)[..., None] * Vh)


def soft_clip(X: Tensor, c: float | Tensor) -> Tensor:
    c = torch.as_tensor(c, dtype=torch.float64)[..., None]

    def shrunk(sigma: Tensor) -> Tensor:  # sigma / sqrt(1 + (sigma/c)²), written so that no square overflows
        less, more = torch.minimum(sigma, c), torch.maximum(sigma, c)
        return less / torch.sqrt(1 + (less / more) ** 2)

    return on_singular_values(X, shrunk)


def hard_clip(X: Tensor, c: float | Tensor) -> Tensor:
    c = torch.as_tensor(c, dtype=torch.float64)[..., None]
    return on_singular_values(X, lambda sigma: torch.minimum(sigma, c))


def polar(X: Tensor) -> Tensor:
    return on_singular_values(X, lambda sigma: (sigma > 1e-5 * sigma.amax(-1, keepdim=True)).double())


def shape_spike(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """O for one matrix M and a spike with orthonormal U and unit columns V."""
    M, U, V = M.double(), U.double(), V.double()
    tail = M - U @ (U.mT @ M)
    sigma = torch.sqrt(tail.square().sum() / (min(M.shape) - U.shape[-1]))
    return tail + sigma * U @ V.mT


def norm(X: Tensor) -> Tensor:
    """The largest singular value of every matrix."""
    return torch.linalg.matrix_norm(X.double(), ord=2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest relative Frobenius error of a stack; a zero matrix must be met exactly."""
    difference = torch.linalg.matrix_norm(actual.double() - expected)
    size = torch.linalg.matrix_norm(expected)
    return torch.where(size > 0, difference / size.clamp_min(1e-300), difference).amax().item()
