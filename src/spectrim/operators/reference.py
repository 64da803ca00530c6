"""Maps of singular values by the eigendecomposition of the float64 Gram matrix: right for every spectrum, and slow.

What soft and hard clipping and orthogonalisation fall back on, and are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._stack import entry_maximum

__all__ = ["scale_singular_values"]

COLUMN_BLOCK = 256  # columns held in float64 at a time


def scale_singular_values(X: Tensor, gain: Callable[[Tensor], Tensor], *, overwrite: bool = False) -> Tensor:
    """Q diag(gain(σ)) Qᵀ X for X (..., m, n), m <= n, with left singular vectors Q: every σ becomes gain(σ) σ.

    Singular values are read from the rows of QᵀX, not from the eigenvalues, which know only their squares. A matrix
    that is not finite comes back as NaN.

    Args:
        X: (..., m, n), m <= n, float32 or float64.
        gain: from singular values (..., m) in float64 to factors of the same shape, none negative.
        overwrite: put the result in X's place.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given.
    """
    scale = entry_maximum(X).double()
    finite = scale.isfinite()  # a decomposition refuses what is not
    stack, m = X.shape[:-2], X.shape[-2]

    def unit(columns: Tensor) -> Tensor:
        return columns.to(torch.float64, copy=True).div_(scale).masked_fill_(~finite, 0.0)

    blocks = torch.split(X, COLUMN_BLOCK, dim=-1)
    gram = torch.zeros(math.prod(stack), m, m, dtype=torch.float64, device=X.device)
    for columns in blocks:
        Y = unit(columns).reshape(-1, m, columns.shape[-1])
        gram.baddbmm_(Y, Y.mT)
    del Y
    Q: Tensor = torch.linalg.eigh(gram).eigenvectors.view(*stack, m, m)
    del gram
    squares = torch.zeros((), dtype=torch.float64, device=X.device)
    for columns in blocks:
        squares = squares + (Q.mT @ unit(columns)).square_().sum(-1)
    factors = torch.where(finite[..., 0], gain(squares.sqrt() * scale[..., 0]), torch.nan)
    # With half of each factor on either side, P is made of Q alone, in its place where no derivative needs it.
    half = factors.sqrt()[..., None, :]
    Q = Q * half if Q.requires_grad else Q.mul_(half)
    P = Q @ Q.mT
    del Q
    out = X if overwrite else torch.empty_like(X)
    for columns, place in zip(blocks, torch.split(out, COLUMN_BLOCK, dim=-1), strict=True):
        place.copy_(P @ columns.double())
    return out
