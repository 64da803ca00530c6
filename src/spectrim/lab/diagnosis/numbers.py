"""Statistics of one matrix: its weights, its momentum and its gradients on many batches. All are plain values for
``spectrum.json``; :mod:`spectrim.monitor` computes and defines them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spectrim.monitor.denoising import remains, remains_at
from spectrim.monitor.gradient_stacks import decompose
from spectrim.monitor.metrics import rank_of_spike, singular_values
from spectrim.monitor.noise import Overlap, noise_structure
from spectrim.monitor.sketch import sample_stride, wide
from spectrim.monitor.spike_tail import direction_noise, second_moment, spike_energy
from spectrim.monitor.tails import TailFit, fit_tails, kurtosis, log_density

__all__ = ["gradient_numbers", "matrix_numbers", "plain"]

ENTRIES = 2**15
"""Entries of a matrix for the fits of tails: evenly spread, and the same on every batch."""

HISTOGRAM_BINS = 61


def matrix_numbers(matrix: Tensor) -> dict[str, Any]:
    """Spectrum and norms of weights or momentum (m, n)."""
    values = singular_values(matrix)
    energy = float(values.square().sum())
    top = float(values[0])
    return {
        "norm": energy**0.5,
        "spectral_norm": top,
        "stable_rank": energy / top**2 if top > 0 else None,
        "spike_share": spike_energy(values, rank_of_spike(matrix.shape)),
        "spectrum": values.tolist(),
    }


def gradient_numbers(gradients: Tensor, thresholds: Sequence[float] = ()) -> dict[str, Any] | None:
    """The statistics of a stack of gradients (batches, m, n); None if all of them are zero.

    Args:
        gradients: of one matrix, on at least four batches.
        thresholds: of spectral soft clipping, to measure the clipped gradient too.
    """
    if not gradients.any():
        return None
    m, n = gradients.shape[1:]
    rank = rank_of_spike((m, n))
    decomposed = decompose(wide(gradients))
    values = decomposed.values
    structure = noise_structure(gradients, rank)
    left = remains(gradients, decomposed=decomposed)
    at = [remains_at(gradients, "soft clip", threshold, decomposed=decomposed) for threshold in thresholds]
    return {
        "gradient": {
            "norm": float(values.square().sum(-1).mean().sqrt()),
            "spectral_norm": float(values[:, 0].mean()),
            "spike_share": spike_energy(values, rank),
            "spectrum": values.mean(0).tolist(),
        },
        "mean_gradient": {
            "energy": structure.signal_energy._asdict(),
            "spike_share": spike_energy(structure.mean_spectrum, rank),
            "spectrum": structure.mean_spectrum.tolist(),
            "floor": structure.floor_spectrum.tolist(),
            "above_floor": structure.above_floor,
        },
        "noise": {
            "energy": structure.noise_energy,
            "spike_share": spike_energy(structure.noise_spectrum, rank),
            "spectrum": structure.noise_spectrum.tolist(),
            "left": overlap_numbers(structure.left),
            "right": overlap_numbers(structure.right),
            "recurring_left": overlap_numbers(structure.recurring_left),
            "recurring_right": overlap_numbers(structure.recurring_right),
            "localisation": structure.localisation._asdict(),
            "gaussian_localisation": structure.gaussian_localisation,
        },
        "directions": [asdict(group) for group in direction_noise(gradients)],
        "second_moment": asdict(second_moment(gradients, rank, decomposed=decomposed)),
        "tails": tail_numbers(gradients),
        "operators": [{**asdict(each), "signal": each.signal._asdict(), "gain": each.gain} for each in left],
        "thresholds": [
            {
                **asdict(each),
                "signal": each.signal._asdict(),
                "gain": each.gain,
                "above": float((values > each.strength).double().mean()),
            }
            for each in at
        ],
    }


def overlap_numbers(overlap: Overlap) -> dict[str, Any]:
    return {"share": overlap.share._asdict(), "expected": overlap.expected, "angles": list(overlap.angles)}


def tail_numbers(gradients: Tensor) -> dict[str, Any]:
    """Fits to the entries of the noise, their kurtosis, and a histogram of them.

    Entries whose noise is exactly zero, such as an embedding's of a token that no batch holds, are left out.
    """
    flat = gradients.flatten(1)
    sample = flat[:, :: sample_stride(flat.shape[1], gradients.shape[-1], ENTRIES)].double()
    count = len(sample)
    noise = (sample - sample.mean(0)) * (count / (count - 1)) ** 0.5
    noise = noise[noise != 0]
    fits = fit_tails(noise)
    scale = float(noise.square().mean().sqrt())
    return {
        "entries": sample.shape[1],
        "scale": scale,
        "kurtosis": asdict(kurtosis(sample)),
        "fits": [asdict(fit) for fit in fits],
        "histogram": histogram(noise, scale, fits),
    }


def histogram(noise: Tensor, scale: float, fits: Sequence[TailFit]) -> dict[str, Any]:
    """Densities of |N|/scale, observed and fitted, on bins that widen with |N|; a bin without entries has none.

    The standard deviation is the unit, so that matrices of any size are comparable.
    """
    size = noise.abs() / scale
    edges = torch.sinh(torch.linspace(0, float(torch.asinh(size.max())), HISTOGRAM_BINS, dtype=torch.float64))
    counts = torch.histogram(size.cpu(), edges)[0]
    widths = edges.diff()
    density = counts / counts.sum() / widths
    middles = (edges[1:] + edges[:-1]) / 2
    fitted = {fit.model: log_density(fit.model, middles * scale, fit.parameters).exp() * 2 * scale for fit in fits}
    return {
        "size": middles.tolist(),
        "observed": [value if count > 0 else None for value, count in zip(density.tolist(), counts, strict=True)],
        **{model: values.tolist() for model, values in fitted.items()},
    }


def plain(value: Any) -> Any:
    """The same nested value with numbers of six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
