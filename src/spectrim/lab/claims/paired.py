"""Claims judged by paired differences: final losses, tokens to a loss and numbers of the weights, seed by seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spectrim.lab.claims.claim import Finding, Interval, Verdict, by_sign, mean_interval
from spectrim.lab.experiments.results import tokens_to_reach
from spectrim.lab.logging.run_result import Curve

__all__ = [
    "NO_INTERVAL",
    "Results",
    "better",
    "better_in",
    "better_than_variant",
    "fewer_tokens",
    "less_harmed",
    "no_worse",
    "no_worse_than_variant",
    "paired",
    "runs_of",
    "smaller",
    "token_shares",
]

Results = Mapping[str, Any]
"""What ``results.json`` of every study holds, by its name."""

MARGIN = 0.02
"""Nats per token: a loss that is higher by less counts as equal, where a claim says "as good"."""

AS_GOOD = f"; up to {MARGIN:g} more counts as equal"


def runs_of(results: Results, study: str, recipe: str) -> dict[str, dict[str, Any]]:
    """Every seed's own numbers of a recipe."""
    return dict(results[study]["recipes"][recipe]["seeds"])


def loss_differences(results: Results, one: tuple[str, str], other: tuple[str, str]) -> dict[str, float] | None:
    """Final losses of one (study, recipe) minus another's, by seed; None if a run diverged or for one seed alone."""
    left, right = runs_of(results, *one), runs_of(results, *other)
    pairs = {seed: (left[seed]["final_loss"], right[seed]["final_loss"]) for seed in left if seed in right}
    if len(pairs) < 2 or any(None in pair for pair in pairs.values()):
        return None
    return {seed: mine - theirs for seed, (mine, theirs) in pairs.items()}


def paired(results: Results, one: tuple[str, str], other: tuple[str, str]) -> Interval | None:
    """The mean of :func:`loss_differences` with its interval."""
    differences = loss_differences(results, one, other)
    return None if differences is None else mean_interval(list(differences.values()))


def token_shares(results: Results, recipe: str, baseline: str) -> list[float] | None:
    """Shares of the baseline's tokens after which each seed reaches its final loss; None where one never does."""
    shares = []
    others = runs_of(results, "recipes", baseline)
    for seed, run in runs_of(results, "recipes", recipe).items():
        target, curve = others[seed]["final_loss"], Curve(**run["curve"])
        reached = None if target is None else tokens_to_reach(curve, target)
        if reached is None:
            return None
        shares.append(reached / curve.tokens[-1])
    return shares


def sooner(shares: Sequence[float] | None, baseline: str) -> str:
    """How much sooner a recipe reaches the baseline's loss, in words, from what :func:`token_shares` returns."""
    if shares is None or len(shares) < 2:
        return f"not every seed reaches {baseline}'s loss"
    return f"{baseline}'s loss after {mean_interval([100 * share for share in shares]).shown('.0f')} % of its tokens"


NO_INTERVAL = Finding(verdict="cannot be judged", measured="A run diverged, or there are fewer than two seeds.")


def better(recipe: str, baseline: str) -> Callable[[Results], Finding]:
    """Judges that a recipe ends at a lower loss than another."""

    def judge(results: Results) -> Finding:
        tokens = sooner(token_shares(results, recipe, baseline), baseline)
        return compared(results, recipe, ("recipes", baseline), baseline, f"; {tokens}")

    return judge


def better_in(study: str, recipe: str, baseline: str) -> Callable[[Results], Finding]:
    """Judges that a recipe ends at a lower loss than another in a study of its own circumstances."""

    def judge(results: Results) -> Finding:
        difference = paired(results, (study, recipe), (study, baseline))
        if difference is None:
            return NO_INTERVAL
        return Finding(
            verdict=by_sign(difference),
            measured=f"Final loss of {recipe} minus that of {baseline}: {difference.shown('+.4f')}.",
            figures={"difference": difference},
            caveat="At the rates that were tuned in other circumstances.",
        )

    return judge


def better_than_variant(recipe: str, study: str) -> Callable[[Results], Finding]:
    """Judges that a recipe ends at a lower loss than its variant in another study."""
    return lambda results: compared(results, recipe, (study, recipe), f"the variant {study}")


def no_worse(recipe: str, baseline: str) -> Callable[[Results], Finding]:
    """Judges that a recipe ends at a loss that is at most :data:`MARGIN` above another's."""
    return lambda results: compared(results, recipe, ("recipes", baseline), baseline, AS_GOOD, margin=MARGIN)


def no_worse_than_variant(recipe: str, study: str) -> Callable[[Results], Finding]:
    """The same for a recipe and its variant in another study."""
    return lambda results: compared(results, recipe, (study, recipe), f"the variant {study}", AS_GOOD, margin=MARGIN)


def compared(
    results: Results, recipe: str, other: tuple[str, str], name: str, more: str = "", *, margin: float = 0.0
) -> Finding:
    """Judges that a recipe's final loss is less than a (study, recipe)'s plus a margin.

    Args:
        name: what the report calls the other.
        more: what the report says after the difference.
    """
    difference = paired(results, ("recipes", recipe), other)
    if difference is None:
        return NO_INTERVAL
    return Finding(
        verdict=by_sign(difference.minus(margin)),
        measured=f"Final loss of {recipe} minus that of {name}: {difference.shown('+.4f')}{more}.",
        figures={"difference": difference},
    )


def fewer_tokens(recipe: str, baseline: str, published: float) -> Callable[[Results], Finding]:
    """Judges that a recipe needs less than all of the baseline's tokens to its loss."""

    def judge(results: Results) -> Finding:
        shares = token_shares(results, recipe, baseline)
        difference = paired(results, ("recipes", recipe), ("recipes", baseline))
        if difference is None:
            return NO_INTERVAL
        tokens = sooner(shares, baseline)
        told = f"Final loss of {recipe} minus {baseline}'s: {difference.shown('+.4f')}; {tokens}."
        figures: dict[str, Any] = {"difference": difference}
        if shares is None:
            return Finding(verdict=by_sign(difference), measured=told, figures=figures)
        saved = mean_interval([1 - share for share in shares])
        verdict: Verdict = "holds" if saved.low > 0 else by_sign(difference)
        reached = "reached" if saved.high >= published else "not reached"
        return Finding(
            verdict=verdict,
            measured=f"{told} The published saving of {100 * published:.0f} % is {reached} within the interval.",
            figures=figures | {"saved": saved},
        )

    return judge


def smaller(recipe: str, baseline: str, key: str, name: str) -> Callable[[Results], Finding]:
    """Judges that a number of the trained weights is smaller than the baseline's."""

    def judge(results: Results) -> Finding:
        left, right = runs_of(results, "recipes", recipe), runs_of(results, "recipes", baseline)
        if any(run[key] is None for run in (*left.values(), *right.values())) or len(left) < 2:
            return NO_INTERVAL
        ratio = mean_interval([left[seed][key] / right[seed][key] for seed in left])
        return Finding(
            verdict=by_sign(ratio.minus(1)),
            measured=f"{name} of {recipe} over {baseline}'s: {ratio.shown()}.",
            figures={"ratio": ratio},
        )

    return judge


def less_harmed(results: Results, study: str, recipe: str) -> tuple[Verdict | None, str, Interval | None]:
    """Judges that the circumstances of a study raise a recipe's loss by less than AdamW's.

    Returns:
        The verdict, None if both diverged; what was measured; and the difference of the two increases.
    """
    raised = {name: loss_differences(results, (study, name), ("recipes", name)) for name in (recipe, "adamw")}
    own, other = raised[recipe], raised["adamw"]
    if own is None or other is None:
        diverged = [name for name, increase in raised.items() if increase is None]
        verdict: Verdict | None = (
            "holds" if diverged == ["adamw"] else "does not hold" if diverged == [recipe] else None
        )
        return verdict, f"{' and '.join(diverged)} diverged", None
    gap = mean_interval([own[seed] - other[seed] for seed in own])
    mine, theirs = (mean_interval(list(increase.values())).shown("+.3f") for increase in (own, other))
    return by_sign(gap), f"{recipe} loses {mine} and adamw {theirs}", gap
