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

from ._product import product
from ._stack import can_read, entry_maximum, reading_is_free

__all__ = ["map_singular_values"]


class Image(Protocol):
    """What a map makes of singular values (..., m), given the size (..., 1) at which it bends."""

    def __call__(self, sigma: Tensor, bend: Tensor) -> Tensor: ...


class Bend(Protocol):
    """The size (E, 1) at which a map bends, from singular values (E, m) and units (E, 1) of a part of the stack."""

    def __call__(self, sigma: Tensor, unit: Tensor, part: slice) -> Tensor: ...


COLUMN_BLOCK = 256  # columns held in float64 at a time
LOOSEST = 1e-6  # rounding that is allowed whatever the tolerance: by as much a singular value may exceed its image


def map_singular_values(
    X: Tensor,
    bend: Bend,
    image: Image,
    tol: float = LOOSEST,
    *,
    rescale: bool = True,
    overwrite: bool = False,
    easy: Callable[[Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Give every singular value σ of X (..., m, n), m <= n, its image. A matrix that is not finite comes back as NaN.

    Args:
        X: float32 or float64. Float64 is computed in units of the matrix's largest entry, so that nothing overflows;
            the squares of float32 numbers lie within float64 as they are, in units of one.
        bend: below the size that it gives the map is a straight line through zero, and accuracy of single directions
            does not matter.
        image: from singular values and the bend to their images. All of these are in float64.
        tol: relative error allowed.
        rescale: whether the result is in X's units. Otherwise it has none.
        overwrite: put the result in X's place.
        easy: from the float64 Gram matrix of a float32 matrix on the CPU to a float32 matrix by which it is multiplied,
            or None where there is none.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given.
    """
    flat = X.flatten(0, -3) if X.ndim > 3 else X.reshape(-1, *X.shape[-2:])
    if not can_read(flat):
        unit = entry_maximum(flat).double()
        unit = torch.where(unit.isfinite(), unit, torch.nan)
        return _by_svd(flat, unit, lambda sigma: image(sigma, bend(sigma, unit[..., 0], slice(None))), rescale).view(
            X.shape
        )
    out = flat if overwrite else torch.empty_like(flat)
    # A float64 Gram matrix knows singular values to eps times the square of their distance from the largest.
    reach = math.sqrt(min(tol / 10, LOOSEST) / torch.finfo(torch.float64).eps)
    # A host takes one matrix at a time, which stays in its cache.
    one = reading_is_free(flat)
    easy = easy if one and X.dtype == torch.float32 else None
    for part in [slice(i, i + 1) for i in range(len(flat))] if one else [slice(None)]:
        _by_gram(flat[part], partial(bend, part=part), image, reach, rescale, out[part], easy)
    return out.view(X.shape)


def _by_gram(
    X: Tensor,
    bend: Callable[[Tensor, Tensor], Tensor],
    image: Image,
    reach: float,
    rescale: bool,
    out: Tensor,
    easy: Callable[[Tensor], Tensor | None] | None,
) -> None:
    """The map as P X with P made of the Gram matrix's eigenvectors; by singular vectors where those would not do."""
    unit = entry_maximum(X) if X.dtype == torch.float64 else None
    blocks = torch.split(X, COLUMN_BLOCK, dim=-1)
    gram = torch.zeros(len(X), X.shape[-2], X.shape[-2], dtype=torch.float64, device=X.device)
    for columns in blocks:
        Y = _in_units(columns, unit)
        gram.baddbmm_(Y, Y.mT)
    finite = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).isfinite()
    all_finite = bool(finite.all())
    if all_finite and easy is not None and (root := easy(gram[0])) is not None:
        for columns, place in zip(blocks, torch.split(out, COLUMN_BLOCK, dim=-1), strict=True):
            place.copy_(product(root, columns[0]))
        return
    if not all_finite:  # decompositions refuse what is not finite
        gram = torch.where(finite[..., None], gram, 0.0)
    values, Q = torch.linalg.eigh(gram)
    del gram
    sigma = values.clamp_min(0.0).sqrt()
    units = torch.ones_like(sigma[..., :1]) if unit is None else unit[..., 0]
    bends = bend(sigma, units)
    largest, least = sigma[..., -1:], torch.maximum(bends, sigma[..., :1])
    served = (largest <= reach * least) | ~finite | (largest == 0)
    all_served = bool(served.all())
    if all_served or len(X) > 1:
        # Eigenvalues far below the bend may be rounded to zero; there the map is a straight line.
        safe = torch.maximum(sigma, 1e-9 * torch.minimum(bends, largest)).clamp_min(torch.finfo(torch.float64).tiny)
        factors = torch.where(largest > 0, image(safe, bends) / safe, 0.0)
        # With half of each factor on either side, P is made of Q alone, in its place where no derivative needs it.
        half = torch.where(finite, factors, torch.nan).sqrt()[..., None, :]
        Q = Q * half if Q.requires_grad else Q.mul_(half)
        P = Q @ Q.mT
        del Q
        for columns, place in zip(blocks, torch.split(out, COLUMN_BLOCK, dim=-1), strict=True):
            mapped = P @ _in_units(columns, unit)
            if unit is not None and rescale:
                mapped = mapped * unit
            # What the eigenvectors do not serve keeps its entries, for it may lie in the place of the result.
            place.copy_(mapped if all_served else torch.where(served[..., None], mapped, columns.double()))
    for i in served.logical_not().nonzero()[:, 0].tolist():
        out[i] = _by_svd(X[i], units[i, :, None], partial(image, bend=bends[i]), rescale)


def _by_svd(X: Tensor, unit: Tensor, image: Callable[[Tensor], Tensor], rescale: bool) -> Tensor:
    Y = _in_units(X, unit).masked_fill_(unit.isnan(), 0.0)  # decompositions refuse what is not finite
    try:
        U, sigma, Vh = torch.linalg.svd(Y, full_matrices=False)
    except RuntimeError:  # has been seen to fail to converge on a matrix, and not on its transpose
        V, sigma, Uh = torch.linalg.svd(Y.mT.contiguous(), full_matrices=False)
        U, Vh = Uh.mT, V.mT
    mapped = (U * image(sigma)[..., None, :]) @ Vh
    return (mapped * unit if rescale else torch.where(unit.isnan(), torch.nan, mapped)).to(X.dtype)


def _in_units(X: Tensor, unit: Tensor | None) -> Tensor:
    """X over its unit, in float64."""
    Y = X.to(torch.float64, copy=True)
    return Y if unit is None else Y.div_(unit)
