"""Combines the results of several recipes and seeds."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from spectrim.lab.experiments.statistics import Difference, paired_difference
from spectrim.lab.logging.run_result import Curve, RunResult
from spectrim.lab.recipes.names import BASELINE

__all__ = ["mean_curve", "summarise", "tokens_to_reach"]

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


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds at each evaluation; None where a seed has no loss, as after it diverged."""
    if any(curve.tokens != curves[0].tokens for curve in curves):
        raise ValueError("curves were evaluated at different token counts")
    columns = zip(*(curve.val_loss for curve in curves), strict=True)
    return Curve(tokens=curves[0].tokens, val_loss=tuple(mean(column) for column in columns))


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def tokens_to_reach(curve: Curve, target: float) -> float | None:
    """Tokens at which the curve first reaches the target, linear between evaluations; None if never."""
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


def at_time(run: RunResult, seconds: float) -> tuple[float, float | None]:
    """A run's share of tokens and its loss after a number of seconds of training, both linear between
    evaluations. A run that has ended by then has all of its tokens and its final loss.
    """
    assert run.dynamics is not None
    times, tokens, losses = run.dynamics.seconds, run.curve.tokens, run.curve.val_loss
    if seconds >= times[-1]:
        return 1.0, losses[-1]
    for index, end in enumerate(times):
        if seconds < end:
            begin, seen, loss = (times[index - 1], tokens[index - 1], losses[index - 1]) if index else (0.0, 0, None)
            share = (seconds - begin) / (end - begin)
            following = losses[index]
            between = None if loss is None or following is None else loss + share * (following - loss)
            return (seen + share * (tokens[index] - seen)) / tokens[-1], between
    raise AssertionError("the last time is beyond")


def equal_time(results: Sequence[RunResult], baseline: Sequence[RunResult]) -> dict[str, Any] | None:
    """A recipe's loss at the time when AdamW with the same seed ends; None if a time is unknown.

    Keys: "seconds" of AdamW's training, the recipe's "loss" at that time, the "share" of its own steps that it has done
    by then, and the paired "difference" to AdamW's final loss.
    """
    done = {run.seed: run.dynamics.seconds[-1] for run in baseline if run.dynamics is not None}
    if not results or any(run.dynamics is None or run.seed not in done for run in results):
        return None
    reached = {run.seed: at_time(run, done[run.seed]) for run in results}
    losses = {seed: loss for seed, (_, loss) in reached.items()}
    difference = paired_difference(losses, {run.seed: run.final_loss for run in baseline})
    return {
        "seconds": fmean(done.values()),
        "loss": mean(list(losses.values())),
        "share": fmean(share for share, _ in reached.values()),
        "difference": as_dict(difference),
    }


def as_dict(difference: Difference | None) -> dict[str, Any] | None:
    return difference.model_dump(mode="json") if difference else None


def course(results: Sequence[RunResult]) -> dict[str, Any]:
    """Mean training time, and counts of diverged runs and loss spikes, from the logs; None if unknown."""
    known = [run.dynamics for run in results if run.dynamics is not None]
    if len(known) < len(results):
        return dict.fromkeys(("seconds", "curve_seconds", "unevenness", "diverged", "loss_spikes"))
    return {
        "seconds": fmean(run.seconds[-1] for run in known),
        "curve_seconds": [fmean(column) for column in zip(*(run.seconds for run in known), strict=True)],
        "unevenness": max(run.unevenness for run in known),
        "diverged": sum(run.diverged for run in known),
        "loss_spikes": sum(run.loss_spikes for run in known),
    }


def mean_by_frequency(runs: Sequence[dict[str, float | None] | None]) -> dict[str, float | None] | None:
    """The mean over seeds in each bucket; None where a run of an older version has no buckets."""
    known = [run for run in runs if run is not None]
    if not known or len(known) < len(runs):
        return None
    return {ranks: mean([run.get(ranks) for run in known]) for ranks in known[0]}


def summarise(runs: Mapping[str, Sequence[RunResult]]) -> dict[str, dict[str, Any]]:
    """For each recipe the means over its seeds, its differences to AdamW, and every seed's own numbers.

    - ``optimizer_share``: the optimizer's share of a step's median time.
    - ``tokens_to_adamw``: the tokens at which the recipe's mean validation curve first reaches the final loss of
      AdamW's mean curve, over AdamW's tokens; None if it never does or there is no AdamW to compare with.
    - ``difference_to_adamw``: of the final losses, paired by seed; see
      :class:`spectrim.lab.experiments.statistics.Difference`.
    - ``equal_time``: see :func:`equal_time`.
    - ``seconds``, ``curve_seconds`` (at evaluations), ``unevenness`` (the worst), ``diverged``, ``loss_spikes``: see
      :func:`course`.
    - ``plan``: :class:`spectrim.lab.logging.run_result.Plan`, the same for every seed.
    """
    curves = {name: mean_curve([run.curve for run in results]) for name, results in runs.items()}
    baseline = curves.get(BASELINE)
    target = baseline.val_loss[-1] if baseline else None
    adamw = runs.get(BASELINE, ())
    summary: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        reached = tokens_to_reach(curves[name], target) if target is not None else None
        losses, others = ({run.seed: run.final_loss for run in side} for side in (results, adamw))
        summary[name] = {
            **{key: mean([getattr(run, key) for run in results]) for key in MEANS},
            "optimizer_share": fmean(run.optimizer_ms / run.step_ms if run.step_ms else 0.0 for run in results),
            "tokens_to_adamw": reached / baseline.tokens[-1] if baseline and reached is not None else None,
            "difference_to_adamw": as_dict(paired_difference(losses, others)),
            "equal_time": equal_time(results, adamw) if adamw else None,
            **course(results),
            "val_loss_by_frequency": mean_by_frequency([run.val_loss_by_frequency for run in results]),
            "curve": curves[name].model_dump(mode="json"),
            "plan": results[0].plan.model_dump(mode="json") if results[0].plan else None,
            "seeds": {
                str(run.seed): run.model_dump(mode="json", exclude={"recipe", "seed", "plan"}) for run in results
            },
        }
    return summary
