"""Paired statistics over seeds.

The same seed gives all recipes the same batches and initial weights, so losses are compared seed by seed, which cancels
the differences between seeds.
"""

from collections.abc import Mapping
from statistics import fmean

from spectrim.lab.settings import Config

__all__ = ["CONFIDENCE", "Difference", "paired_difference"]

CONFIDENCE = 0.95


class Difference(Config):
    """The mean of paired differences, with its interval by Student's t; one pair has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    pairs: int


def paired_difference(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Difference | None:
    """The mean of ``values`` minus ``baseline`` over their seeds.

    None if a seed is missing on either side or has no value, since a mean over the surviving runs would be biased.
    """
    if not values or values.keys() != baseline.keys():
        return None
    differences = []
    for seed, value in values.items():
        other = baseline[seed]
        if value is None or other is None:
            return None
        differences.append(value - other)
    mean, pairs = fmean(differences), len(differences)
    if pairs == 1:
        return Difference(mean=mean, pairs=1)
    from scipy import stats

    error = float(stats.sem(differences))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1))
    return Difference(mean=mean, low=mean - half, high=mean + half, pairs=pairs)
