"""Maps of singular values in float64: slow, accurate for every finite matrix.

Clipping and orthogonalisation use them if faster solvers fail, and in tests. Eigenvectors of the Gram matrix are
accurate if the relevant singular values are within a few orders of magnitude of the largest; other matrices take a
singular value decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._product import product
from ._stack import can_read, entry_maximum, reading_is_free

__all__ = ["map_singular_values"]


#: Maps singular values (..., m); its second argument (..., 1) is the size below which the map is linear.
Image = Callable[[Tensor, Tensor], Tensor]

COLUMN_BLOCK = 256  # columns that are converted to float64 at a time
LOOSEST = 1e-6  # the largest rounding error, for any tolerance; a singular value may exceed its image by as much


def map_singular_values(
    X: Tensor,
    bend: Tensor | float,
    image: Image,
    tol: float = LOOSEST,
    *,
    rescale: bool = True,
    overwrite: bool = False,
    easy: Callable[[Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Map the singular values of X (..., m, n), m <= n. A matrix with NaN or infinity gives NaN.

    Args:
        X: float32 or float64. Float64 matrices are divided by their unit, the largest entry, so that no square
            overflows; float32 has the unit 1, since its squares do not overflow in float64.
        bend: the size below which the map is linear, where small singular values need no relative accuracy: one for
            every matrix of the stack, (E, 1) in float64, or as a share of each largest singular value.
        image: computes the images of singular values, in float64.
        tol: the largest relative error.
        rescale: True if the result is multiplied by the unit.
        overwrite: store the result in X's memory.
        easy: a faster method for float32 on the CPU. It takes the float64 Gram matrix and returns the float32 matrix
            by which X is multiplied, or None if it does not apply.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given.
    """
    flat = X.flatten(0, -3) if X.ndim > 3 else X.reshape(-1, *X.shape[-2:])
    if not can_read(flat):
        unit = entry_maximum(flat).double()
        unit = torch.where(unit.isfinite(), unit, torch.nan)
        return _by_svd(flat, unit, bend, image, rescale).view(X.shape)
    out = flat if overwrite else torch.empty_like(flat)
    # By a float64 Gram matrix, the relative error of σ is eps (σ₁/σ)².
    reach = math.sqrt(min(tol / 10, LOOSEST) / torch.finfo(torch.float64).eps)
    # The CPU takes one matrix at a time, which stays in its cache.
    one = reading_is_free(flat)
    easy = easy if one and X.dtype == torch.float32 else None
    for part in [slice(i, i + 1) for i in range(len(flat))] if one else [slice(None)]:
        own = bend[part] if isinstance(bend, Tensor) else bend
        _by_gram(flat[part], own, image, reach, rescale, out[part], easy)
    return out.view(X.shape)


def _by_gram(
    X: Tensor,
    bend: Tensor | float,
    image: Image,
    reach: float,
    rescale: bool,
    out: Tensor,
    easy: Callable[[Tensor], Tensor | None] | None,
) -> None:
    """Compute P X with P from the Gram matrix's eigenvectors, or else use singular vectors."""
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
    if not all_finite:  # decompositions raise an error for NaN
        gram = torch.where(finite[..., None], gram, 0.0)
    values, Q = torch.linalg.eigh(gram)
    del gram
    sigma = values.clamp_min(0.0).sqrt()
    units = torch.ones_like(sigma[..., :1]) if unit is None else unit[..., 0]
    bends = _bends(bend, sigma, units)
    largest, least = sigma[..., -1:], torch.maximum(bends, sigma[..., :1])
    served = (largest <= reach * least) | ~finite | (largest == 0)
    all_served = bool(served.all())
    if all_served or len(X) > 1:
        # Far below the bend, where eigenvalues may be rounded to zero, the map is linear.
        safe = torch.maximum(sigma, 1e-9 * torch.minimum(bends, largest)).clamp_min(torch.finfo(torch.float64).tiny)
        factors = torch.where(largest > 0, image(safe, bends) / safe, 0.0)
        # P = (Q √f)(Q √f)ᵀ needs no copy of Q, unless a derivative needs Q.
        half = torch.where(finite, factors, torch.nan).sqrt()[..., None, :]
        Q = Q * half if Q.requires_grad else Q.mul_(half)
        P = Q @ Q.mT
        del Q
        for columns, place in zip(blocks, torch.split(out, COLUMN_BLOCK, dim=-1), strict=True):
            mapped = P @ _in_units(columns, unit)
            if unit is not None and rescale:
                mapped = mapped * unit
            # Other matrices keep their entries: with ``overwrite``, ``out`` is X.
            place.copy_(mapped if all_served else torch.where(served[..., None], mapped, columns.double()))
    for i in served.logical_not().nonzero()[:, 0].tolist():
        own = bend[i] if isinstance(bend, Tensor) else bend
        out[i] = _by_svd(X[i], units[i, :, None], own, image, rescale)


def _bends(bend: Tensor | float, sigma: Tensor, unit: Tensor) -> Tensor:
    """The bend of every matrix, (E, 1), in its unit."""
    return bend / unit if isinstance(bend, Tensor) else bend * sigma.amax(-1, keepdim=True)


def _by_svd(X: Tensor, unit: Tensor, bend: Tensor | float, image: Image, rescale: bool) -> Tensor:
    Y = _in_units(X, unit).masked_fill_(unit.isnan(), 0.0)  # decompositions raise an error for NaN
    try:
        U, sigma, Vh = torch.linalg.svd(Y, full_matrices=False)
    except RuntimeError:  # it may fail to converge for a matrix and not for its transpose
        V, sigma, Uh = torch.linalg.svd(Y.mT.contiguous(), full_matrices=False)
        U, Vh = Uh.mT, V.mT
    mapped = (U * image(sigma, _bends(bend, sigma, unit[..., 0]))[..., None, :]) @ Vh
    return (mapped * unit if rescale else torch.where(unit.isnan(), torch.nan, mapped)).to(X.dtype)


def _in_units(X: Tensor, unit: Tensor | None) -> Tensor:
    """X over its unit, in float64."""
    Y = X.to(torch.float64, copy=True)
    return Y if unit is None else Y.div_(unit)
