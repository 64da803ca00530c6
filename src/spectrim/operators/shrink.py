"""Entry-wise shrinkage: large entries of a gradient are taken for noise, small ones are left alone.

Heavy-tailed noise sits on single entries, and its singular vectors do too, so shrinking entries controls the spectrum.
Source: arXiv 2605.27733.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ._stack import per_matrix, reading_is_free, working_dtype
from .faddeeva import faddeeva

__all__ = ["DEFAULT_SHRINK_FACTOR", "DEFAULT_SHRINK_FORM", "ShrinkForm", "bayes_shrink", "entry_scale", "smooth_shrink"]

ShrinkForm = Literal["redescending", "monotone", "hard"]

# The form whose risk exceeds the Bayes risk least under Cauchy noise of all sizes on up to a tenth of the entries
# (docs/shrinkage.md, written by benchmarks/shrinkage_risk.py). The factor that this risk prefers, 3.4, costs more in
# training than it gains; of those tried there, 12 was the best with every recipe (docs/evidence.md).
DEFAULT_SHRINK_FACTOR = 12.0
DEFAULT_SHRINK_FORM: ShrinkForm = "redescending"

# Entries that a host works on at a time: a block and what is made of it stay in the cache of a core.
HOST_BLOCK = 2**18

# |y|/τ from which on the monotone form is τ to every digit, and whose square does not overflow.
FLAT = 1e18

# (E|x|^½)² for x ~ N(0, 1), so that the scale of Gaussian entries is their standard deviation.
HALF_MOMENT = math.sqrt(2) * math.gamma(0.75) ** 2 / math.pi


def smooth_shrink(G: Tensor, tau: float | Tensor, *, form: ShrinkForm = "redescending") -> Tensor:
    r"""Shrink every entry y of G that is large against τ.

        redescending: y / (1 + (y/τ)²)        monotone: y / sqrt(1 + (y/τ)²)        hard: y clamped to [−τ, τ]

    Args:
        G: floating point, any shape; with two or more dimensions (..., m, n).
        tau: τ, in the units of G's entries: a number > 0, or a tensor broadcasting over the stack, G.shape[:-2], as
            :func:`entry_scale` returns it; on an accelerator it is not read. Where it is zero, or below the smallest
            normal number of the working precision, the result is zero.
        form: "redescending" sends the largest entries to zero, the others hold them at τ.

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
        # Where the square overflows the result is zero; it would be below 1e-19 τ.
        ratio = matrices / tau
        excess = torch.addcmul(one, ratio, ratio)
        shrunk = matrices / (excess if form == "redescending" else excess.sqrt())
    return shrunk.reshape(G.shape).to(G.dtype)


def shrink_block(y: Tensor, tau: float, form: ShrinkForm, *, out: Tensor) -> None:
    """:func:`smooth_shrink` of a few entries by one τ >= 0, written to ``out``, in as few passes as there can be."""
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
    r"""The scale of G's entries, which a few arbitrarily large ones cannot break: (mean |y|^½)² / 0.6760.

    For Gaussian entries it is their standard deviation. Cauchy noise, which has no mean, leaves it finite.

    Args:
        G: floating point. (..., m, n) gives one scale per matrix of the stack, shape (...); a vector or a number gives
            a scalar.

    Returns:
        The scale in working precision (float32, or float64 for float64). Zero for a zero or an empty matrix, NaN for
        one that is not finite.
    """
    y = G.to(working_dtype(G))
    if _in_blocks(y):
        total = torch.stack([_root_sum(matrix) for matrix in _flat_matrices(y)]).reshape(G.shape[:-2])
    else:
        total = y.abs().sqrt().sum((-2, -1) if y.ndim >= 2 else None)
    mean = total / max(math.prod(G.shape[-2:]), 1)
    # No more than there is a number for, where entries are near the largest; but what is not finite stays so.
    return (mean / math.sqrt(HALF_MOMENT)).square().clamp(max=torch.finfo(y.dtype).max) + 0 * mean


def _in_blocks(y: Tensor) -> bool:
    """Whether a tensor is worked on block by block: where passes cost more than calls, and its storage is one run."""
    return y.numel() > HOST_BLOCK and reading_is_free(y) and y.is_contiguous() and not y.requires_grad


def _flat_matrices(y: Tensor) -> Tensor:
    """The matrices of a contiguous stack as rows; a vector is one."""
    return y.view(-1, y.shape[-2] * y.shape[-1]) if y.ndim >= 2 else y.view(1, -1)


def _root_sum(y: Tensor) -> Tensor:
    """The sum of √|y|, block by block."""
    scratch = y.new_empty(min(HOST_BLOCK, len(y)))
    parts = [torch.abs(block, out=scratch[: len(block)]).sqrt_().sum() for block in torch.split(y, HOST_BLOCK)]
    return torch.stack(parts).sum()


def bayes_shrink(G: Tensor, sigma: float, gamma: float, *, contamination: float = 1.0) -> Tensor:
    r"""The Bayes estimate of x from y = x + n, entry by entry: what :func:`smooth_shrink` stands in for.

        x ~ N(0, σ²);   n ~ Cauchy(0, γ) with probability ε, otherwise 0;   w = Faddeeva function, z = (y + iγ)/(σ√2)
        E[x|y] = y − εγ Im w(z) / (ε Re w(z) + (1 − ε) exp(−y²/2σ²))

    For large y it falls as 2σ²/y where ε = 1. Computed in float64, and slowly: for analysis, not for training.

    Args:
        G: y, floating point, any shape.
        sigma: σ > 0, the standard deviation of the signal, in the units of G.
        gamma: γ >= 0, the scale of the noise, in the units of G.
        contamination: ε in [0, 1], the share of entries that noise hits.

    Returns:
        E[x|y], a new tensor of G's shape and dtype.

    Raises:
        ValueError: a parameter is outside its range, or G is not floating-point.

    The closed form is ours, from the Voigt profile; the model is that of arXiv 2605.27733.
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
