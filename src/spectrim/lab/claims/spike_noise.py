"""SPECTRA's noise model for clipping gradients: a large low-rank spike of mean zero (arXiv 2603.14315).

A stochastic gradient is g = G + ℓ U Vᵀ with r random orthonormal directions on either side, ℓ far above ‖G‖₂. The claim
is that spectral clipping at c ≥ ‖G‖₂ keeps at least a third of ⟨G, G⟩ in expectation and cuts the variance from rℓ² to
the order of rc², and that scaling the whole gradient cannot do both.
"""

import torch
from torch import Tensor

from spectrim.lab.claims.claim import Finding, Interval, mean_interval
from spectrim.operators import hard_clip

__all__ = ["pre_clipping"]

SHAPE, RANK, DRAWS = (48, 32), 3, 400
SPIKE = 100.0  # ℓ over ‖G‖₂


def pre_clipping() -> Finding:
    """Kept signal and variance of gradients whose noise is a low-rank spike, clipped spectrally and as a whole."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(*SHAPE, dtype=torch.float64, generator=generator)
    G /= torch.linalg.matrix_norm(G, 2)
    noisy = torch.stack([G + SPIKE * spike(generator) for _ in range(DRAWS)])
    bound = 1.0  # c = ‖G‖₂
    clipped = hard_clip(noisy, bound)
    kept, variance = signal(clipped, G), spread(clipped) / (RANK * bound**2)
    # Scale the whole gradient instead: once to the clipped gradient's signal, once to its variance.
    norms = noisy.flatten(1).norm(dim=1)
    as_much_signal = noisy * (kept.mean / signal(noisy, G).mean)
    as_little_noise = noisy * (spread(clipped) / spread(noisy)) ** 0.5
    whole_variance = spread(as_much_signal) / (RANK * bound**2)
    whole_kept = signal(as_little_noise, G)
    both = kept.low >= 1 / 3 and variance <= 4
    neither = whole_kept.high < 1 / 3 and whole_variance > 4
    return Finding(
        verdict="holds" if both and neither else "does not hold",
        measured=f"Spectral clipping keeps {kept.shown('.2f')} of ⟨G, G⟩, and its variance is "
        f"{variance:.2f} rc² (unclipped {spread(noisy) / (RANK * bound**2):.0f} rc²). Scaled as a whole to the same "
        f"signal, the variance is {whole_variance:.0f} rc²; scaled to the same variance, {whole_kept.shown()} "
        f"of ⟨G, G⟩ is left.",
        figures={
            "kept": kept,
            "variance": variance,
            "whole_kept": whole_kept,
            "whole_variance": whole_variance,
            "norm_spread": float(norms.std() / norms.mean()),
        },
        caveat=f"One matrix of {SHAPE[0]} x {SHAPE[1]}, r = {RANK}, ℓ = {SPIKE:g} ‖G‖₂, c = ‖G‖₂; "
        "variances up to 4 rc² count as of the order of rc².",
    )


def spike(generator: torch.Generator) -> Tensor:
    """U Vᵀ of random orthonormal columns."""
    sides = [torch.linalg.qr(torch.randn(side, RANK, dtype=torch.float64, generator=generator)).Q for side in SHAPE]
    low_rank: Tensor = sides[0] @ sides[1].T
    return low_rank


def signal(gradients: Tensor, G: Tensor) -> Interval:
    """The mean of ⟨g, G⟩/⟨G, G⟩."""
    return mean_interval(((gradients * G).sum((1, 2)) / G.square().sum()).tolist())


def spread(gradients: Tensor) -> float:
    """E‖g − E g‖²."""
    return float((gradients - gradients.mean(0)).square().sum((1, 2)).mean() * DRAWS / (DRAWS - 1))
