"""A claim of a paper, what was measured for it, and the verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field

from spectrim.lab.settings import Config

__all__ = ["Check", "Claim", "Finding", "Interval", "Verdict", "by_sign", "mean_interval"]

Verdict = Literal["holds", "does not hold", "cannot be judged"]


class Claim(Config):
    """A statement of a paper in our words: an entry of ``claims.toml``."""

    name: str
    """By which ``--only`` selects it."""
    paper: str
    """The arXiv number, or "none"."""
    statement: str
    published: str
    """The paper's number, or what it says instead."""


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
    """What was measured for a claim."""

    verdict: Verdict
    measured: str
    """One sentence with the figures; 95 % intervals in brackets."""
    figures: Mapping[str, float | Interval | Sequence[float]] = Field(default={})
    """The same figures as numbers."""
    caveat: str = ""
    """What the measurement leaves out."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a claim is judged."""

    judge: Callable[[Mapping[str, Any]], Finding]
    """Takes the results of the studies by name, as ``results.json`` of each has them."""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The recipes that must be trained first in each study; none for a check by arithmetic."""


def by_sign(interval: Interval) -> Verdict:
    """The verdict on a claim that a quantity is negative: open where the interval holds zero."""
    if interval.high < 0:
        return "holds"
    return "does not hold" if interval.low > 0 else "cannot be judged"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95 % interval by Student's t; at least two values."""
    from scipy import stats

    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    mean = sum(values) / len(values)
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean=mean, low=mean - half, high=mean + half)
