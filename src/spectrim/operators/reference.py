"""Maps of singular values by the eigendecomposition of the float64 Gram matrix: right for every spectrum, and slow.

What soft and hard clipping and orthogonalisation fall back on, and are held against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._stack import entry_maximum

__all__ = ["scale_singular_values"]

COLUMN_BLOCK = 512  # columns held in float64 at a time


def scale_singular_values(X: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
    """Q diag(gain(σ)) Qᵀ X for X (..., m, n), m <= n, with left singular vectors Q: every σ becomes gain(σ) σ.

    Singular values are read from the rows of QᵀX, not from the eigenvalues, which know only their squares. A matrix
    that is not finite comes back as NaN.

    Args:
        X: (..., m, n), m <= n, float32 or float64.
        gain: from singular values (..., m) in float64 to factors of the same shape.

    Returns:
        A new tensor of X's shape and dtype.
    """
    scale = entry_maximum(X).double()
    finite = scale.isfinite()  # a decomposition refuses what is not

    def unit(columns: Tensor) -> Tensor:
        return torch.where(finite, columns.double() / scale, 0.0)

    blocks = torch.split(X, COLUMN_BLOCK, dim=-1)
    gram = torch.zeros((), dtype=torch.float64, device=X.device)
    for columns in blocks:
        Y = unit(columns)
        gram = gram + Y @ Y.mT
    Q: Tensor = torch.linalg.eigh(gram).eigenvectors
    del gram
    squares = torch.zeros((), dtype=torch.float64, device=X.device)
    for columns in blocks:
        squares = squares + (Q.mT @ unit(columns)).square().sum(-1)
    factors = gain(squares.sqrt() * scale[..., 0])
    P = torch.where(finite, (Q * factors[..., None, :]) @ Q.mT, torch.nan)
    out = torch.empty_like(X)
    for columns, place in zip(blocks, torch.split(out, COLUMN_BLOCK, dim=-1), strict=True):
        place.copy_(P @ columns.double())
    return out
