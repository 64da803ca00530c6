"""Results: what one run ended with, and what several seeds of several recipes say together."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from spectrim.lab.config import Config

__all__ = ["BASELINE", "Curve", "RunResult", "mean_curve", "summarise", "tokens_to_reach"]

BASELINE = "adamw"
"""What every recipe is held against."""

MEANS = (
    "final_loss",
    "optimizer_ms",
    "step_ms",
    "forward_backward_ms",
    "rest_ms",
    "rest_share",
    "state_bytes",
    "weight_norm",
    "largest_singular_value",
    "lr",
    "embedding_lr",
    "head_lr",
    "clip_bound",
)
"""Numbers of a run that are averaged over seeds."""


class Curve(Config):
    """Validation loss against tokens seen; a loss that was not finite is None."""

    tokens: tuple[int, ...]
    val_loss: tuple[float | None, ...]


class RunResult(Config):
    """What one finished run ended with."""

    recipe: str
    seed: int
    lr: float
    embedding_lr: float
    head_lr: float
    clip_bound: float | None = None
    final_loss: float | None
    step_ms: float
    forward_backward_ms: float
    optimizer_ms: float
    rest_ms: float
    rest_share: float
    state_bytes: int
    weight_norm: float | None
    largest_singular_value: float | None
    parameters: int
    curve: Curve
    data_key: str
    """Hash of the tokens that the run was trained on."""
    environment: dict[str, str | int]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds at each evaluation; None where any seed has none, for a diverged run has no mean."""
    if any(curve.tokens != curves[0].tokens for curve in curves):
        raise ValueError("curves were evaluated at different token counts")
    columns = zip(*(curve.val_loss for curve in curves), strict=True)
    return Curve(tokens=curves[0].tokens, val_loss=tuple(mean(column) for column in columns))


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def tokens_to_reach(curve: Curve, target: float) -> float | None:
    """Tokens at which the curve first is at or below the target, linear between evaluations; None if it never is."""
    before: tuple[int, float] | None = None
    for tokens, loss in zip(curve.tokens, curve.val_loss, strict=True):
        if loss is None or not math.isfinite(loss):
            before = None
            continue
        if loss <= target:
            if before is None:
                return float(tokens)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = (tokens, loss)
    return None


def summarise(runs: Mapping[str, Sequence[RunResult]]) -> dict[str, dict[str, Any]]:
    """For each recipe the means over its seeds, ``tokens_to_adamw``, and every seed's own numbers.

    ``tokens_to_adamw`` is the tokens at which the recipe's mean validation curve first reaches the final loss of
    AdamW's mean curve, over AdamW's tokens; None if it never does or there is no AdamW to compare with.
    """
    curves = {name: mean_curve([run.curve for run in results]) for name, results in runs.items()}
    baseline = curves.get(BASELINE)
    target = baseline.val_loss[-1] if baseline else None
    summary: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        reached = tokens_to_reach(curves[name], target) if target is not None else None
        summary[name] = {
            **{key: mean([getattr(run, key) for run in results]) for key in MEANS},
            "tokens_to_adamw": reached / baseline.tokens[-1] if baseline and reached is not None else None,
            "curve": curves[name].model_dump(mode="json"),
            "seeds": {str(run.seed): run.model_dump(mode="json", exclude={"recipe", "seed"}) for run in results},
        }
    return summary
