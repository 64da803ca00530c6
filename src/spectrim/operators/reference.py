"""Maps of singular values in float64, right for every finite matrix, and slow.

What soft and hard clipping and orthogonalisation fall back on, and are held against. The eigenvectors of the Gram
matrix serve wherever the singular values that matter lie within a few decades of the largest; for the rest, which the
Gram matrix would drown in the rounding of its largest entries, there is the singular value decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ._stack import can_read, entry_maximum

__all__ = ["map_singular_values"]


class Image(Protocol):
    """What a map makes of singular values (..., m), given the size (..., 1) at which it bends."""

    def __call__(self, sigma: Tensor, bend: Tensor) -> Tensor: ...


COLUMN_BLOCK = 256  # columns held in float64 at a time
LOOSEST = 1e-6  # rounding that is allowed whatever the tolerance: by as much a singular value may exceed its image


def map_singular_values(
    X: Tensor,
    bend: Callable[[Tensor, Tensor], Tensor],
    image: Image,
    tol: float = LOOSEST,
    *,
    rescale: bool = True,
    overwrite: bool = False,
) -> Tensor:
    """Give every singular value σ of X (..., m, n), m <= n, its image. A matrix that is not finite comes back as NaN.

    Everything is computed in units of the matrix's largest entry, so that nothing overflows.

    Args:
        X: float32 or float64.
        bend: from singular values (..., m) and the unit (..., 1) to the size (..., 1) below which the map is a straight
            line through zero, and accuracy of single directions does not matter.
        image: from singular values and the bend to their images. All of these are in float64.
        tol: relative error allowed.
        rescale: whether the result is in X's units. Otherwise it has none.
        overwrite: put the result in X's place.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given.
    """
    flat = X.flatten(0, -3) if X.ndim > 3 else X.reshape(-1, *X.shape[-2:])
    unit = entry_maximum(flat).double()
    unit = torch.where(unit.isfinite(), unit, torch.nan)
    if not can_read(flat):
        return _by_svd(flat, unit, lambda sigma: image(sigma, bend(sigma, unit[..., 0])), rescale).view(X.shape)
    out = flat if overwrite else torch.empty_like(flat)
    # A float64 Gram matrix knows singular values to eps times the square of their distance from the largest.
    reach = math.sqrt(min(tol / 10, LOOSEST) / torch.finfo(torch.float64).eps)
    served, bends = _by_gram(flat, unit, bend, image, reach, rescale, out)
    for i in served.logical_not().nonzero()[:, 0].tolist():
        out[i] = _by_svd(flat[i], unit[i], partial(image, bend=bends[i]), rescale)
    return out.view(X.shape)


def _by_gram(
    X: Tensor,
    unit: Tensor,
    bend: Callable[[Tensor, Tensor], Tensor],
    image: Image,
    reach: float,
    rescale: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """The map as P X with P made of the Gram matrix's eigenvectors; whether that serves each matrix, and its bend.

    Singular values are read from the rows of QᵀX, not from the eigenvalues, which know only their squares.
    """
    finite = unit.isfinite()
    blocks = torch.split(X, COLUMN_BLOCK, dim=-1)
    gram = torch.zeros(len(X), X.shape[-2], X.shape[-2], dtype=torch.float64, device=X.device)
    for columns in blocks:
        Y = _in_units(columns, unit)
        gram.baddbmm_(Y, Y.mT)
    Q: Tensor = torch.linalg.eigh(gram).eigenvectors
    del gram
    squares = torch.zeros((), dtype=torch.float64, device=X.device)
    for columns in blocks:
        squares = squares + (Q.mT @ _in_units(columns, unit)).square_().sum(-1)
    sigma = squares.sqrt()
    bends = bend(sigma, unit[..., 0])
    least = torch.maximum(bends[..., 0], sigma.amin(-1))
    served = (sigma.amax(-1) <= reach * least) | ~finite[:, 0, 0] | (sigma.amax(-1) == 0)
    factors = torch.where(sigma > 0, image(sigma, bends) / sigma.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    # With half of each factor on either side, P is made of Q alone, in its place where no derivative needs it.
    half = factors.sqrt()[..., None, :]
    Q = Q * half if Q.requires_grad else Q.mul_(half)
    P = Q @ Q.mT
    del Q
    all_served = bool(served.all())
    for columns, place in zip(blocks, torch.split(out, COLUMN_BLOCK, dim=-1), strict=True):
        mapped = _out_of_units(P @ _in_units(columns, unit), unit, rescale)
        # What the eigenvectors do not serve keeps its entries, for it may lie in the place of the result.
        place.copy_(mapped if all_served else torch.where(served[:, None, None], mapped, columns.double()))
    return served, bends


def _by_svd(X: Tensor, unit: Tensor, image: Callable[[Tensor], Tensor], rescale: bool) -> Tensor:
    Y = _in_units(X, unit)
    try:
        U, sigma, Vh = torch.linalg.svd(Y, full_matrices=False)
    except RuntimeError:  # has been seen to fail to converge on a matrix, and not on its transpose
        V, sigma, Uh = torch.linalg.svd(Y.mT.contiguous(), full_matrices=False)
        U, Vh = Uh.mT, V.mT
    return _out_of_units((U * image(sigma)[..., None, :]) @ Vh, unit, rescale).to(X.dtype)


def _in_units(X: Tensor, unit: Tensor) -> Tensor:
    """X over its unit in float64; zero where the unit is NaN, for decompositions refuse what is not finite."""
    return X.to(torch.float64, copy=True).div_(unit).masked_fill_(unit.isnan(), 0.0)


def _out_of_units(X: Tensor, unit: Tensor, rescale: bool) -> Tensor:
    return X * unit if rescale else torch.where(unit.isnan(), torch.nan, X)
