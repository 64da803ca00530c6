"""The Faddeeva function w(z) = exp(−z²) erfc(−iz) in the upper half plane.

Shrinkage needs it since its real part is the Voigt profile, a Gaussian convolved with a Cauchy density.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["faddeeva"]

TERMS = 40  # of the rational series, for an absolute error of 1e-13
FAR = 12.0  # |z| from which on the continued fraction is used; it keeps the relative accuracy of a tiny real part
FRACTIONS = 12


def faddeeva(z: Tensor) -> Tensor:
    """w(z) for complex z with Im z >= 0, in complex128.

    Weideman's rational series (SIAM J. Numer. Anal. 31, 1994) for small |z|, Laplace's continued fraction for large.
    """
    z = z.to(torch.complex128)
    far = z.abs() > FAR
    # Both forms are evaluated for all z; arguments outside a form's region are replaced by safe ones.
    return torch.where(far, _continued_fraction(torch.where(far, z, FAR)), _series(torch.where(far, 0.0, z)))


def _series(z: Tensor) -> Tensor:
    """2 p(Z)/(L − iz)² + 1/(√π (L − iz)) with Z = (L + iz)/(L − iz) and p a polynomial."""
    L, coefficients = _series_coefficients()
    below = L - 1j * z
    Z = (L + 1j * z) / below
    p = torch.zeros_like(Z)
    for coefficient in reversed(coefficients):
        p = p * Z + coefficient
    return 2 * p / below**2 + 1 / (math.sqrt(math.pi) * below)


@functools.cache
def _series_coefficients() -> tuple[float, list[float]]:
    """L and the Fourier coefficients of (L² + t²) exp(−t²) in the angle θ with t = L tan(θ/2)."""
    L = math.sqrt(TERMS / math.sqrt(2))
    count = 4 * TERMS
    angles = [2 * math.pi * k / count for k in range(-count // 2 + 1, count // 2)]
    samples = [(angle, L * math.tan(angle / 2)) for angle in angles]
    values = [(angle, math.exp(-t * t) * (L * L + t * t)) for angle, t in samples]
    return L, [sum(f * math.cos(n * angle) for angle, f in values) / count for n in range(1, TERMS + 1)]


def _continued_fraction(z: Tensor) -> Tensor:
    """i/√π / (z − ½/(z − 1/(z − 3/2/(z − …))))."""
    below = z
    for k in range(FRACTIONS, 0, -1):
        below = z - (k / 2) / below
    return 1j / (math.sqrt(math.pi) * below)
