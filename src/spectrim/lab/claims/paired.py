"""Judges final losses, tokens to a loss and numbers of the weights by their differences between recipes, seed by seed.

Every judge takes the results of the studies and the recipes to compare.
"""

from collections.abc import Sequence
from typing import Any

from spectrim.lab.claims.claim import Finding, Interval, Results, Verdict, by_sign, mean_interval
from spectrim.lab.experiments.results import tokens_to_reach
from spectrim.lab.logging.run_result import Curve

__all__ = [
    "NO_INTERVAL",
    "better",
    "better_in",
    "better_than_variant",
    "fewer_tokens",
    "less_harmed",
    "no_worse",
    "no_worse_than_variant",
    "paired",
    "ratio",
    "runs_of",
    "smaller",
    "token_shares",
]

MARGIN = 0.02
"""Nats per token: a loss that is higher by less counts as equal, where a claim says "as good"."""

AS_GOOD = f"; up to {MARGIN:g} more counts as equal"

NO_INTERVAL = Finding(verdict="cannot be judged", measured="A run diverged, or there are fewer than two seeds.")


def runs_of(results: Results, study: str, recipe: str) -> dict[str, dict[str, Any]]:
    """Results of a recipe's runs, by seed."""
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


def ratio(results: Results, key: str, recipe: str, baseline: str) -> Interval | None:
    """The mean ratio of a number of a recipe's runs to the baseline's; None if a run has none or for one seed alone."""
    left, right = runs_of(results, "recipes", recipe), runs_of(results, "recipes", baseline)
    if any(run[key] is None for run in (*left.values(), *right.values())) or len(left) < 2:
        return None
    return mean_interval([left[seed][key] / right[seed][key] for seed in left])


def token_shares(results: Results, recipe: str, baseline: str) -> list[float] | None:
    """Shares of the baseline's tokens that a recipe needs to reach its final loss, by seed; None if one never does."""
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
    """The mean of :func:`token_shares` in words."""
    if shares is None or len(shares) < 2:
        return f"not every seed reaches {baseline}'s loss"
    return f"{baseline}'s loss after {mean_interval([100 * share for share in shares]).shown('.0f')} % of its tokens"


def better(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that a recipe ends at a lower loss than another."""
    tokens = sooner(token_shares(results, recipe, baseline), baseline)
    return compared(results, ("recipes", recipe), ("recipes", baseline), baseline, f"; {tokens}")


def better_in(results: Results, recipe: str, baseline: str, study: str) -> Finding:
    """Judges that a recipe ends at a lower loss than another in a study with other batches than those of tuning."""
    caveat = "At the rates that were tuned in other circumstances."
    return compared(results, (study, recipe), (study, baseline), baseline, caveat=caveat)


def better_than_variant(results: Results, recipe: str, study: str) -> Finding:
    """Judges that a recipe ends at a lower loss than its variant in another study."""
    return compared(results, ("recipes", recipe), (study, recipe), f"the variant {study}")


def no_worse(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that a recipe ends at a loss at most :data:`MARGIN` above another's."""
    return compared(results, ("recipes", recipe), ("recipes", baseline), baseline, AS_GOOD, margin=MARGIN)


def no_worse_than_variant(results: Results, recipe: str, study: str) -> Finding:
    """Judges that a recipe ends at a loss at most :data:`MARGIN` above that of its variant in another study."""
    return compared(results, ("recipes", recipe), (study, recipe), f"the variant {study}", AS_GOOD, margin=MARGIN)


def compared(
    results: Results,
    one: tuple[str, str],
    other: tuple[str, str],
    name: str,
    more: str = "",
    *,
    margin: float = 0.0,
    caveat: str = "",
) -> Finding:
    """Judges that the final loss of one (study, recipe) is less than another's plus a margin.

    Args:
        name: the other's name in the report.
        more: the report's words after the difference.
    """
    difference = paired(results, one, other)
    if difference is None:
        return NO_INTERVAL
    return Finding(
        verdict=by_sign(difference.minus(margin)),
        measured=f"Final loss of {one[1]} minus that of {name}: {difference.shown('+.4f')}{more}.",
        figures={"difference": difference},
        caveat=caveat,
    )


def fewer_tokens(results: Results, recipe: str, baseline: str, published: float) -> Finding:
    """Judges that a recipe reaches the baseline's loss before it has seen all of the baseline's tokens."""
    shares = token_shares(results, recipe, baseline)
    difference = paired(results, ("recipes", recipe), ("recipes", baseline))
    if difference is None:
        return NO_INTERVAL
    verdict = by_sign(difference)
    told = f"Final loss of {recipe} minus {baseline}'s: {difference.shown('+.4f')}; {sooner(shares, baseline)}."
    figures = {"difference": difference}
    if shares is not None:
        figures["saved"] = saved = mean_interval([1 - share for share in shares])
        verdict = "holds" if saved.low > 0 else verdict
        reached = "reached" if saved.high >= published else "not reached"
        told += f" The published saving of {100 * published:.0f} % is {reached} within the interval."
    return Finding(verdict=verdict, measured=told, figures=figures)


def smaller(results: Results, recipe: str, baseline: str, key: str, name: str) -> Finding:
    """Judges that a number of the trained weights is smaller than the baseline's."""
    found = ratio(results, key, recipe, baseline)
    if found is None:
        return NO_INTERVAL
    return Finding(
        verdict=by_sign(found.minus(1)),
        measured=f"{name} of {recipe} over {baseline}'s: {found.shown()}.",
        figures={"ratio": found},
    )


def less_harmed(
    results: Results, study: str, recipe: str, baseline: str
) -> tuple[Verdict | None, str, Interval | None]:
    """Judges that a study's conditions raise a recipe's loss by less than the baseline's.

    Returns:
        The verdict, None if both diverged; what was measured; and the difference of the two increases.
    """
    raised = {name: loss_differences(results, (study, name), ("recipes", name)) for name in (recipe, baseline)}
    own, other = raised[recipe], raised[baseline]
    if own is None or other is None:
        diverged = [name for name, increase in raised.items() if increase is None]
        verdicts: dict[tuple[str, ...], Verdict] = {(recipe,): "does not hold", (baseline,): "holds"}
        return verdicts.get(tuple(diverged)), f"{' and '.join(diverged)} diverged", None
    gap = mean_interval([own[seed] - other[seed] for seed in own])
    mine, theirs = (mean_interval(list(increase.values())).shown("+.3f") for increase in (own, other))
    return by_sign(gap), f"{recipe} loses {mine} and {baseline} {theirs}", gap
