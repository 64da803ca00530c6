"""Entry-wise shrinkage of the large entries of a gradient, which are taken for noise.

Heavy-tailed noise and its singular vectors are concentrated on single entries, so shrinking entries also controls the
spectrum. Source: arXiv 2605.27733.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from spectrim.kernels.shrinking import ShrinkForm

from ._stack import per_matrix, reading_is_free, working_dtype
from .faddeeva import faddeeva

__all__ = ["DEFAULT_SHRINK_FACTOR", "DEFAULT_SHRINK_FORM", "ShrinkForm", "bayes_shrink", "entry_scale", "smooth_shrink"]

# This form's risk exceeds the Bayes risk least, under Cauchy noise of all scales on up to a tenth of the entries
# (docs/shrinkage.md, written by benchmarks/shrinkage_risk.py). The factor of least risk, 3.4, makes training worse; of
# the factors tried in training, 12 was the best with every recipe (docs/evidence.md).
DEFAULT_SHRINK_FACTOR = 12.0
DEFAULT_SHRINK_FORM: ShrinkForm = "redescending"

# Entries that the CPU works on at a time, so that a block and its results stay in a core's cache.
HOST_BLOCK = 2**18

# From this |y|/τ on, the monotone form is τ to every digit. Its square does not overflow.
FLAT = 1e18

# (E|x|^½)² for x ~ N(0, 1), so that the scale of Gaussian entries is their standard deviation.
HALF_MOMENT = math.sqrt(2) * math.gamma(0.75) ** 2 / math.pi


def smooth_shrink(G: Tensor, tau: float | Tensor, *, form: ShrinkForm = "redescending") -> Tensor:
    r"""Shrink every entry y of G that is large relative to τ.

        redescending: y / (1 + (y/τ)²)        monotone: y / sqrt(1 + (y/τ)²)        hard: y clamped to [−τ, τ]

    Args:
        G: floating point, any shape; with two or more dimensions (..., m, n).
        tau: τ, in the units of G's entries: a number > 0, or a tensor broadcasting over the stack, G.shape[:-2], as
            :func:`entry_scale` returns it; on an accelerator its values are not checked. If it is zero, or below the
            smallest normal number of the working precision, the result is zero.
        form: "redescending" maps the largest entries to nearly zero, the others map them to ±τ.

    Returns:
        A new tensor of G's shape and dtype. The map is odd.
    """
    if form not in get_args(ShrinkForm):
        raise ValueError(f"form={form!r}: expected one of {', '.join(map(repr, get_args(ShrinkForm)))}")
    if not G.is_floating_point():
        raise ValueError(f"G has dtype {G.dtype}: expected a real floating-point type")
    y = G.to(working_dtype(G))
    matrices = y if y.ndim >= 2 else y.reshape(1, -1)
    tau = per_matrix(tau, matrices, "tau")
    if _in_blocks(y):
        shrunk = torch.empty_like(y)
        scales = tau.expand(*matrices.shape[:-2], 1, 1).reshape(-1).tolist()
        pieces = zip(_flat_matrices(y), _flat_matrices(shrunk), scales, strict=True)
        for source, target, scale in pieces:
            for block, out in zip(source.split(HOST_BLOCK), target.split(HOST_BLOCK), strict=True):
                shrink_block(block, scale, form, out=out)
        return shrunk.to(G.dtype)
    if form == "hard":
        shrunk = matrices.clamp(-tau, tau)
    else:
        smallest = torch.finfo(y.dtype).tiny
        one = torch.where(tau < smallest, math.inf, 1.0).to(y.dtype)
        tau = tau.clamp_min(smallest)
        if form == "monotone":
            matrices = matrices.clamp(-FLAT * tau, FLAT * tau)
        # If the square overflows, the result is zero; the exact result is below 1e-19 τ.
        ratio = matrices / tau
        excess = torch.addcmul(one, ratio, ratio)
        shrunk = matrices / (excess if form == "redescending" else excess.sqrt())
    return shrunk.reshape(G.shape).to(G.dtype)


def shrink_block(y: Tensor, tau: float, form: ShrinkForm, *, out: Tensor) -> None:
    """:func:`smooth_shrink` of a block of entries by one τ >= 0, written to ``out``, in few passes."""
    smallest = torch.finfo(y.dtype).tiny
    if form == "hard":
        tau = min(tau, torch.finfo(y.dtype).max)
        torch.clamp(y, -tau, tau, out=out)
        return
    if tau < smallest:
        torch.mul(y, 0.0, out=out)
        return
    one = torch.ones((), dtype=y.dtype)
    if form == "redescending":
        torch.div(y, tau, out=out)
        torch.addcmul(one, out, out, out=out)
        torch.div(y, out, out=out)
    else:
        largest = min(FLAT * tau, torch.finfo(y.dtype).max)
        torch.clamp(y, -largest, largest, out=out)
        ratio = out / tau
        out.div_(torch.addcmul(one, ratio, ratio, out=ratio).sqrt_())


def entry_scale(G: Tensor) -> Tensor:
    r"""A robust scale of G's entries: (mean |y|^½)² / 0.6760.

    For Gaussian entries it is their standard deviation. It is finite for Cauchy noise, which has no mean.

    Args:
        G: floating point. (..., m, n) gives one scale per matrix of the stack, shape (...); a vector or a number gives
            a scalar.

    Returns:
        The scale in working precision (float32, or float64 for float64). Zero for a zero or an empty matrix, NaN for
        a matrix with NaN or infinity.
    """
    y = G.to(working_dtype(G))
    if _in_blocks(y):
        total = torch.stack([_root_sum(matrix) for matrix in _flat_matrices(y)]).reshape(G.shape[:-2])
    else:
        total = y.abs().sqrt().sum((-2, -1) if y.ndim >= 2 else None)
    mean = total / max(math.prod(G.shape[-2:]), 1)
    # The clamp keeps scales finite for entries near the largest number; 0 * mean keeps NaN and infinity.
    return (mean / math.sqrt(HALF_MOMENT)).square().clamp(max=torch.finfo(y.dtype).max) + 0 * mean


def _in_blocks(y: Tensor) -> bool:
    """True if a tensor is processed in blocks: if it is large, contiguous, and on the CPU."""
    return y.numel() > HOST_BLOCK and reading_is_free(y) and y.is_contiguous() and not y.requires_grad


def _flat_matrices(y: Tensor) -> Tensor:
    """The matrices of a contiguous stack as rows; a vector as one row."""
    return y.view(-1, y.shape[-2] * y.shape[-1]) if y.ndim >= 2 else y.view(1, -1)


def _root_sum(y: Tensor) -> Tensor:
    """The sum of √|y|, block by block."""
    scratch = y.new_empty(min(HOST_BLOCK, len(y)))
    parts = [torch.abs(block, out=scratch[: len(block)]).sqrt_().sum() for block in torch.split(y, HOST_BLOCK)]
    return torch.stack(parts).sum()


def bayes_shrink(G: Tensor, sigma: float, gamma: float, *, contamination: float = 1.0) -> Tensor:
    r"""The Bayes estimate of x from y = x + n, entry by entry, which :func:`smooth_shrink` approximates.

        x ~ N(0, σ²);   n ~ Cauchy(0, γ) with probability ε, otherwise 0;   w = Faddeeva function, z = (y + iγ)/(σ√2)
        E[x|y] = y − εγ Im w(z) / (ε Re w(z) + (1 − ε) exp(−y²/2σ²))

    For large y it falls as 2σ²/y if ε = 1. It is computed in float64 and slow: for analysis, not for training.

    Args:
        G: y, floating point, any shape.
        sigma: σ > 0, the standard deviation of the signal, in the units of G.
        gamma: γ >= 0, the scale of the noise, in the units of G.
        contamination: ε in [0, 1], the share of noisy entries.

    Returns:
        E[x|y], a new tensor of G's shape and dtype.

    Raises:
        ValueError: a parameter is outside its range, or G is not floating-point.

    The model is that of arXiv 2605.27733; the closed form, from the Voigt profile, is ours.
    """
    if not G.is_floating_point():
        raise ValueError(f"G has dtype {G.dtype}: expected a real floating-point type")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma={sigma}: expected a positive, finite number")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma={gamma}: expected a finite number, zero or positive")
    if not 0 <= contamination <= 1:
        raise ValueError(f"contamination={contamination}: expected a number from 0 to 1")
    y = G.double()
    if gamma == 0 or contamination == 0:
        return G.clone()
    w = faddeeva(torch.complex(y, torch.full_like(y, gamma)) / (sigma * math.sqrt(2)))
    clean = (1 - contamination) * torch.exp(-0.5 * (y / sigma).square())
    return (y - contamination * gamma * w.imag / (contamination * w.real + clean)).to(G.dtype)
