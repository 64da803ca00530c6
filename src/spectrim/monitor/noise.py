"""Splits a gradient g = G + N into the mean G over batches and the noise N of one batch.

All estimates come from a stack of gradients, one for each batch (:mod:`gradient_stacks`). The mean of K batches still
contains 1/K of the noise's energy. Estimates are corrected for it, or given beside the value for noise alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.monitor.gradient_stacks import Estimate, check_stack, decompose, halves, jackknife
from spectrim.monitor.sketch import wide

__all__ = ["NoiseStructure", "Overlap", "energies", "gaussian_localisation", "noise_structure", "overlap"]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The overlap of two k-dimensional subspaces of an m-dimensional space.

    Attributes:
        share: ‖UᵀU'‖_F²/k, 1 for the same subspace and 0 for orthogonal ones; a mean over batches.
        expected: k/m, the mean for independent random subspaces.
        angles: the k principal angles in degrees, ascending; means over batches.
    """

    share: Estimate
    expected: float
    angles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NoiseStructure:
    """Properties of the mean and the noise of K gradients (m, n).

    Attributes:
        batches: K.
        signal_energy: ‖G‖_F², corrected for the noise in the mean; it may be negative if G is small. Its standard error
            is by jackknife over batches.
        noise_energy: E‖N‖_F² of one batch.
        mean_spectrum: singular values of the mean of all K gradients.
        floor_spectrum: singular values that noise alone would give there: those of half the difference of the means of
            two halves, in which G cancels and the noise is as large as in the mean.
        noise_spectrum: σᵢ(N) of one batch, averaged over batches.
        left, right: overlap of the k leading singular vectors of N with those of G.
        recurring_left, recurring_right: overlap of those of N on one batch with those on another.
        localisation: max|N_ij|/‖N‖₂, averaged over batches.
        gaussian_localisation: approximate localisation of a Gaussian N of this shape.
    """

    batches: int
    signal_energy: Estimate
    noise_energy: float
    mean_spectrum: Tensor
    floor_spectrum: Tensor
    noise_spectrum: Tensor
    left: Overlap
    right: Overlap
    recurring_left: Overlap
    recurring_right: Overlap
    localisation: Estimate
    gaussian_localisation: float

    @property
    def above_floor(self) -> int:
        """The number of singular values of the mean above the largest for noise alone."""
        return int((self.mean_spectrum > self.floor_spectrum[0]).sum())


def noise_structure(gradients: Tensor, rank: int) -> NoiseStructure:
    """Split gradients into mean and noise, and describe both.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 independent batches.
        rank: k, the number of leading singular vectors to compare; from 1 to min(m, n).

    Raises:
        ValueError: the stack or the rank is not allowed.

    Singular vectors of G come from one half of the batches and are compared with the noise of the other half, so that
    no batch is compared with a mean that contains it.
    """
    check_stack(gradients)
    if not 1 <= rank <= min(gradients.shape[1:]):
        raise ValueError(
            f"rank={rank} for matrices of shape {tuple(gradients.shape[1:])}: expected 1 to {min(gradients.shape[1:])}"
        )
    is_tall = gradients.shape[-2] > gradients.shape[-1]
    X = wide(gradients)
    count = len(X)
    means = [half.double().mean(0) for half in halves(X)]
    sizes = [len(half) for half in halves(X)]
    mean = (sizes[0] * means[0] + sizes[1] * means[1]) / count
    # Scaled so that its noise has the same variance as the mean's, 1/K of a batch's.
    floor = (means[0] - means[1]) * math.sqrt(sizes[0] * sizes[1]) / count

    spectra, peaks, shares = _noises(X, means, rank)
    m, n = X.shape[-2:]
    sides = {
        key: _overlap(torch.stack(cosines), size)
        for (key, cosines), size in zip(shares.items(), (m, n, m, n), strict=True)
    }
    signal, noise = energies(X)
    return NoiseStructure(
        batches=count,
        signal_energy=signal,
        noise_energy=noise,
        mean_spectrum=torch.linalg.svdvals(mean),
        floor_spectrum=torch.linalg.svdvals(floor),
        noise_spectrum=torch.stack(spectra).mean(0),
        left=sides["right" if is_tall else "left"],
        right=sides["left" if is_tall else "right"],
        recurring_left=sides["recurring_right" if is_tall else "recurring_left"],
        recurring_right=sides["recurring_left" if is_tall else "recurring_right"],
        localisation=_mean(torch.stack(peaks)),
        gaussian_localisation=gaussian_localisation(m, n),
    )


def _noises(X: Tensor, means: list[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
    """The noise of every batch: singular values, max|N_ij|/‖N‖₂, and cosines of principal angles."""
    spectra, peaks = [], []
    shares: dict[str, list[Tensor]] = {"left": [], "right": [], "recurring_left": [], "recurring_right": []}
    leading: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for own in (0, 1):
        other = 1 - own
        U, _, Vh = torch.linalg.svd(means[other], full_matrices=False)
        half = halves(X)[own]
        for gradient in half:
            # The subtracted mean contains a part of this batch's noise, which the factor corrects.
            N = (gradient.double() - means[own]) * math.sqrt(len(half) / (len(half) - 1))
            values, left = (part[0] for part in decompose(N[None]))
            spectra.append(values)
            peaks.append(N.abs().max() / values[0].clamp_min(torch.finfo(N.dtype).tiny))
            right = torch.nn.functional.normalize(N.mT @ left[:, :rank], dim=0)
            leading[own].append((left[:, :rank], right))
            shares["left"].append(torch.linalg.svdvals(U[:, :rank].mT @ left[:, :rank]))
            shares["right"].append(torch.linalg.svdvals(Vh[:rank] @ right))
    for one, two in zip(*leading, strict=False):
        shares["recurring_left"].append(torch.linalg.svdvals(one[0].mT @ two[0]))
        shares["recurring_right"].append(torch.linalg.svdvals(one[1].mT @ two[1]))
    return spectra, peaks, shares


def energies(gradients: Tensor) -> tuple[Estimate, float]:
    """Unbiased estimates of ‖G‖_F² and E‖N‖_F² from K gradients.

    ‖G‖² is the mean of ⟨g_k, g_l⟩ over pairs of different batches, whose noises are independent.
    """
    check_stack(gradients)
    count = len(gradients)
    total = gradients.sum(0, dtype=torch.float64)
    squares = torch.stack([gradient.double().square().sum() for gradient in gradients])
    with_total = torch.stack([(gradient.double() * total).sum() for gradient in gradients])
    pairs = total.square().sum() - squares.sum()
    signal = float(pairs) / (count * (count - 1))
    without = (pairs - 2 * (with_total - squares)) / ((count - 1) * (count - 2))
    noise = float(squares.mean()) - signal
    return jackknife(without, signal), noise


def overlap(U: Tensor, W: Tensor) -> Overlap:
    """The overlap of the column spaces of two matrices (m, k) with orthonormal columns."""
    return _overlap(torch.linalg.svdvals(U.double().mT @ W.double())[None], U.shape[-2])


def gaussian_localisation(m: int, n: int) -> float:
    """The approximate max|N_ij|/‖N‖₂ for independent Gaussian entries: √(2 ln mn)/(√m + √n)."""
    return math.sqrt(2 * math.log(m * n)) / (math.sqrt(m) + math.sqrt(n))


def _overlap(cosines: Tensor, dimension: int) -> Overlap:
    """The overlap from cosines of principal angles, (batches, k), in descending order."""
    cosines = cosines.clamp(0, 1)
    angles = torch.rad2deg(torch.arccos(cosines)).mean(0)
    return Overlap(
        share=_mean(cosines.square().mean(-1)), expected=cosines.shape[-1] / dimension, angles=tuple(angles.tolist())
    )


def _mean(values: Tensor) -> Estimate:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), error)
