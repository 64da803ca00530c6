"""Settings of ``spectrim claims``, and its budgets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from spectrim.lab.config import DataConfig, Precision
from spectrim.lab.settings import Config, unset

__all__ = ["BUDGETS", "Budget", "ClaimsConfig"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The amount of training."""

    presets: tuple[str, ...]
    """Model sizes: the first for most claims, all of them for claims about size."""
    steps: int
    evaluations: int
    """Evaluations in a run."""
    factors: tuple[float, ...]
    """Factors on the default learning rate, for tuning."""
    raised: tuple[int, ...]
    """Factors on the tuned learning rate, for claims about large rates."""
    ranks: tuple[float, ...]
    """Rank ratios of Spectra beside the published 0.015."""
    batches: tuple[int, ...]
    """Sequences in a batch, beside the default, for claims about the tails of gradients."""
    vocabularies: tuple[int, ...]
    """Sizes of the vocabulary, beside the default, for claims about the tails of gradients."""
    seeds: tuple[int, ...]
    corpora: bool
    """True to train on a second corpus too, the Python sources of the standard library."""


DEFAULT = Budget(
    presets=("1m", "tiny", "2m"),
    steps=240,
    evaluations=12,
    factors=(0.5, 1, 2),
    raised=(4, 16),
    ranks=(0.005, 0.1),
    batches=(1, 4, 64),
    vocabularies=(8192, 32768),
    seeds=(1, 2, 3),
    corpora=True,
)

BUDGETS: Mapping[str, Budget] = {
    "quick": replace(
        DEFAULT,
        presets=("1m",),
        steps=64,
        evaluations=4,
        factors=(0.5, 1, 2),
        raised=(8,),
        ranks=(0.1,),
        batches=(1, 64),
        vocabularies=(),
        corpora=False,
    ),
    "default": DEFAULT,
    "long": replace(
        DEFAULT,
        presets=("10m", "2m", "1m"),
        steps=1280,
        evaluations=24,
        factors=(0.25, 0.5, 1, 2, 4),
        ranks=(0.005, 0.05, 0.1),
        seeds=(1, 2, 3, 4, 5),
    ),
}


class ClaimsConfig(Config):
    """Settings of ``spectrim claims``."""

    budget: Literal["quick", "default", "long"] = "default"
    """How much is trained: runs of 64 steps, of 240 steps, or of 1,280 steps, which need a GPU."""
    only: tuple[str, ...] = unset("all claims")
    """Names of claims, or the beginnings of names; theory stands for those that need no training."""
    data: DataConfig = DataConfig()
    precision: Precision = "auto"
    device: str = "auto"
