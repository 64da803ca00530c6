"""Settings of ``spectrim claims``, and how much each budget trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spectrim.lab.config import DataConfig, Precision
from spectrim.lab.settings import Config, unset

__all__ = ["BUDGETS", "Budget", "ClaimsConfig"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is trained."""

    presets: tuple[str, ...]
    """Sizes of the model; all claims are judged at the first, trends over all."""
    steps: int
    evaluations: int
    """Evaluations in a run."""
    factors: tuple[float, ...]
    """Of the default learning rate, when rates are tuned."""
    raised: tuple[int, ...]
    """Factors on the tuned learning rate, for the largest rates that are safe."""
    ranks: tuple[float, ...]
    """Rank ratios of Spectra beside the published 0.015."""
    batches: tuple[int, ...]
    """Sequences in a batch, beside the default, for the tails of gradients."""
    vocabularies: tuple[int, ...]
    """Sizes of the vocabulary, beside the default, for the same."""
    seeds: tuple[int, ...]
    corpora: bool
    """True if a second corpus is trained on, the Python sources of the standard library."""


BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(
        presets=("1m",),
        steps=64,
        evaluations=4,
        factors=(0.5, 1, 2),
        raised=(8,),
        ranks=(0.1,),
        batches=(1, 64),
        vocabularies=(),
        seeds=(1, 2, 3),
        corpora=False,
    ),
    "default": Budget(
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
    ),
    "long": Budget(
        presets=("10m", "2m", "1m"),
        steps=1280,
        evaluations=24,
        factors=(0.25, 0.5, 1, 2, 4),
        raised=(4, 16),
        ranks=(0.005, 0.05, 0.1),
        batches=(1, 4, 64),
        vocabularies=(8192, 32768),
        seeds=(1, 2, 3, 4, 5),
        corpora=True,
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
