"""A claim of a paper, what was measured for it, and the verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import Field

from spectrim.lab.experiments.statistics import half_width
from spectrim.lab.settings import Config

__all__ = ["Check", "Claim", "Finding", "Interval", "Results", "Verdict", "by_sign", "mean_interval"]

Verdict = Literal["holds", "does not hold", "cannot be judged"]

Results = Mapping[str, Any]
"""The content of every study's ``results.json``, by the study's name."""


class Claim(Config):
    """A statement of a paper in our words: an entry of ``claims.toml``."""

    name: str
    """Selects the claim with ``--only``."""
    paper: str
    """The arXiv number, or "none"."""
    statement: str
    published: str
    """The paper's number, or its statement if it gives none."""


class Interval(Config):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def minus(self, value: float) -> Self:
        """The interval of the quantity less a constant."""
        return self.model_copy(update={"mean": self.mean - value, "low": self.low - value, "high": self.high - value})

    def shown(self, form: str = ".3f") -> str:
        """The mean and the interval in brackets."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


class Finding(Config):
    """The verdict on a claim and the measurement behind it."""

    verdict: Verdict
    measured: str
    """One sentence with the figures; 95 % intervals in brackets."""
    figures: Mapping[str, float | Interval | Sequence[float]] = Field(default={})
    """The same figures as numbers."""
    caveat: str = ""
    """The limits of the measurement."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The function that judges a claim, and the training that it needs."""

    judge: Callable[[Results], Finding]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Recipes to train first, by study; none for a check by arithmetic."""


def by_sign(interval: Interval) -> Verdict:
    """The verdict on the claim that a quantity is negative; undecided if the interval contains zero."""
    if interval.high < 0:
        return "holds"
    return "does not hold" if interval.low > 0 else "cannot be judged"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95 % interval by Student's t; at least two values."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    mean, half = fmean(values), half_width(values)
    return Interval(mean=mean, low=mean - half, high=mean + half)
