"""Regression under Cauchy-contaminated gradients: SGD with shrunk gradients against plain SGD (arXiv 2605.27733)."""

import math

import torch
from torch import Tensor

from spectrim.lab.claims.claim import Finding, Interval, mean_interval
from spectrim.operators import DEFAULT_SHRINK_FACTOR, entry_scale, smooth_shrink

__all__ = ["heavy_tailed_regression"]

SHAPE, SEEDS = (16, 12), 24
LENGTHS = (100, 316, 1000, 3162, 10000)
RATE = 0.5
CONTAMINATION, NOISE = 0.1, 1.0


def heavy_tailed_regression() -> Finding:
    """The slope of log gradient norm over log steps, with shrinkage and without."""
    shrunk, plain = (slopes(shrink) for shrink in (True, False))
    return Finding(
        verdict="holds" if shrunk.high <= -0.25 and plain.high > -0.05 else "does not hold",
        measured=f"The mean gradient norm of a run falls as steps to the power {shrunk.shown('.2f')} "
        f"with shrinkage, and {plain.shown('.2f')} without.",
        figures={"shrunk": shrunk, "plain": plain},
        caveat=f"{SEEDS} seeds, {LENGTHS[0]} to {LENGTHS[-1]} steps, learning rate over the root of their number. "
        "The problem is convex, where a faster rate is possible.",
    )


def slopes(shrink: bool) -> Interval:
    """The least-squares slope of log gradient norm over log steps, over seeds."""
    x = torch.tensor([math.log(length) for length in LENGTHS], dtype=torch.float64)
    y = torch.stack([run(length, shrink).log() for length in LENGTHS])
    centred = x - x.mean()
    return mean_interval(((centred @ y) / centred.square().sum()).tolist())


def run(steps: int, shrink: bool) -> Tensor:
    """The root mean square over a run of ‖∇f‖, for every seed; all seeds run at once.

    f(W) = E‖(W − W*)x‖²/2 with Gaussian features x, so ∇f = W − W*.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    m, n = SHAPE
    gap = normal(SEEDS, m, n)  # W − W*
    rate = RATE / n / math.sqrt(steps / LENGTHS[0])
    total = torch.zeros(SEEDS, dtype=torch.float64)
    for _ in range(steps):
        total += gap.square().sum((1, 2))
        x = normal(SEEDS, n, 1)
        gradient = gap @ x @ x.mT
        cauchy = normal(SEEDS, m, n) / normal(SEEDS, m, n)
        hit = torch.rand(SEEDS, m, n, dtype=torch.float64, generator=generator) < CONTAMINATION
        gradient += NOISE * cauchy * hit
        if shrink:
            tau = DEFAULT_SHRINK_FACTOR * entry_scale(gradient)
            gradient = smooth_shrink(gradient, tau)
        gap -= rate * gradient
    return (total / steps).sqrt()
