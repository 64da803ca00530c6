"""The noise of a gradient: how g = G + N splits into the mean G over batches and the noise N of one batch.

All estimates come from a stack of gradients, one for each batch (:mod:`gradient_stacks`). The mean of K batches still
holds a K-th of the noise's energy: estimates are debiased, or given beside the value that noise alone would produce.
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
    """How far two k-dimensional subspaces of an m-dimensional space agree.

    Attributes:
        share: ‖UᵀU'‖_F²/k, 1 for the same subspace and 0 for orthogonal ones; a mean over batches.
        expected: k/m, what subspaces that have nothing to do with each other give.
        angles: the k principal angles in degrees, ascending; means over batches.
    """

    share: Estimate
    expected: float
    angles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NoiseStructure:
    """What K gradients (m, n) tell of their mean and their noise.

    Attributes:
        batches: K.
        signal_energy: ‖G‖_F² without the noise that is left in the mean; it may come out below zero where there is
            next to none. Its error is that of a jackknife over batches.
        noise_energy: E‖N‖_F² of one batch.
        mean_spectrum: singular values of the mean of all K gradients.
        floor_spectrum: what noise alone gives there: singular values of half the difference of the means of two
            halves, in which G cancels and the noise has the size that it has in the mean.
        noise_spectrum: σᵢ(N) of one batch, the mean over batches.
        left, right: overlap of the k leading singular directions of N with those of G.
        recurring_left, recurring_right: overlap of those of N on one batch with those on another.
        localisation: max|N_ij|/‖N‖₂, the mean over batches.
        gaussian_localisation: about what a Gaussian N of this shape has.
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
        """How many singular values of the mean exceed the largest that noise alone gives."""
        return int((self.mean_spectrum > self.floor_spectrum[0]).sum())


def noise_structure(gradients: Tensor, rank: int) -> NoiseStructure:
    """Split gradients into mean and noise, and describe both.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 independent batches.
        rank: k, how many leading directions are compared; from 1 to min(m, n).

    Raises:
        ValueError: a stack or a rank that cannot be served.

    Directions of G come from one half of the batches and are compared with the noise of the other half, so that a
    batch's noise is never held against a mean that it is part of.
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
    # Scaled so that its noise has the variance of the mean's, 1/K of a batch's.
    floor = (means[0] - means[1]) * math.sqrt(sizes[0] * sizes[1]) / count

    spectra, peaks = [], []
    shares: dict[str, list[Tensor]] = {"left": [], "right": [], "recurring_left": [], "recurring_right": []}
    leading: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for own in (0, 1):
        other = 1 - own
        U, _, Vh = torch.linalg.svd(means[other], full_matrices=False)
        for gradient in halves(X)[own]:
            # The mean that is taken off holds a part of this batch's noise; the factor gives it back.
            N = (gradient.double() - means[own]) * math.sqrt(sizes[own] / (sizes[own] - 1))
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


def energies(gradients: Tensor) -> tuple[Estimate, float]:
    """‖G‖_F² and E‖N‖_F² from K gradients, without bias.

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
    """Of the column spaces of two matrices (m, k) with orthonormal columns."""
    return _overlap(torch.linalg.svdvals(U.double().mT @ W.double())[None], U.shape[-2])


def gaussian_localisation(m: int, n: int) -> float:
    """About max|N_ij|/‖N‖₂ of an m x n matrix of independent Gaussian entries: √(2 ln mn)/(√m + √n)."""
    return math.sqrt(2 * math.log(m * n)) / (math.sqrt(m) + math.sqrt(n))


def _overlap(cosines: Tensor, dimension: int) -> Overlap:
    """From the cosines of principal angles, (batches, k), in descending order."""
    cosines = cosines.clamp(0, 1)
    angles = torch.rad2deg(torch.arccos(cosines)).mean(0)
    return Overlap(
        share=_mean(cosines.square().mean(-1)), expected=cosines.shape[-1] / dimension, angles=tuple(angles.tolist())
    )


def _mean(values: Tensor) -> Estimate:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), error)
