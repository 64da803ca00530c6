"""Means over seeds with their 95 % intervals by Student's t.

The same seed gives all recipes the same batches and initial weights, so losses are compared seed by seed, which cancels
the differences between seeds.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from spectrim.lab.settings import Config

__all__ = ["CONFIDENCE", "Difference", "half_width", "paired_difference"]

CONFIDENCE = 0.95


class Difference(Config):
    """The mean of paired differences with its interval; one pair has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    pairs: int


def half_width(values: Sequence[float]) -> float:
    """Half the width of the interval around the mean of independent values; at least two values."""
    from scipy import stats

    return float(stats.sem(values)) * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))


def paired_difference(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Difference | None:
    """The mean of ``values`` minus ``baseline`` over their seeds.

    None if a seed is missing on either side or has no value, since a mean over the surviving runs would be biased.
    """
    if not values or values.keys() != baseline.keys():
        return None
    pairs = [(value, baseline[seed]) for seed, value in values.items()]
    differences = [value - other for value, other in pairs if value is not None and other is not None]
    if len(differences) < len(pairs):
        return None
    mean = fmean(differences)
    if len(pairs) == 1:
        return Difference(mean=mean, pairs=1)
    half = half_width(differences)
    return Difference(mean=mean, low=mean - half, high=mean + half, pairs=len(pairs))
