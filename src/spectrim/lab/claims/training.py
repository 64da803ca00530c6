"""Claims about training, judged from comparisons: paired differences over seeds, shares of tokens, costs, spectra."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from spectrim.lab.claims.claim import Check, Finding, Interval, Verdict, by_sign, mean_interval
from spectrim.lab.claims.studies import RANKS, ROBUST_FACTORS
from spectrim.lab.experiments.results import tokens_to_reach
from spectrim.lab.logging.run_result import Curve

__all__ = ["CHECKS"]

Results = Mapping[str, Any]

MARGIN = 0.02
"""Nats per token: a loss that is higher by less counts as equal, where a claim says "as good"."""

AS_GOOD = f"; up to {MARGIN:g} more counts as equal"

CLIPPED = ("adamw", "signum", "ademamix")


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


def safe_rates(recipe: str) -> Callable[[Results], Finding]:
    """Judges that a recipe loses less than AdamW when its tuned learning rate is multiplied."""

    def judge(results: Results) -> Finding:
        told, verdicts, figures = [], [], {}
        for times in ROBUST_FACTORS:
            study = f"rate-x{times}"
            raised = {name: loss_differences(results, (study, name), ("recipes", name)) for name in (recipe, "adamw")}
            own, other = raised[recipe], raised["adamw"]
            if own is None or other is None:
                diverged = [name for name, increase in raised.items() if increase is None]
                told.append(f"at {times} times the rate {' and '.join(diverged)} diverged")
                verdicts.append("holds" if diverged == ["adamw"] else "does not hold" if recipe in diverged else None)
                continue
            gap = figures[f"gap_x{times}"] = mean_interval([own[seed] - other[seed] for seed in own])
            mine, theirs = (mean_interval(list(increase.values())).shown("+.3f") for increase in (own, other))
            told.append(f"at {times} times the rate {recipe} loses {mine} and adamw {theirs}")
            verdicts.append(by_sign(gap))
        decided = [verdict for verdict in verdicts if verdict not in (None, "cannot be judged")]
        agreed = set(decided)
        verdict: Verdict = decided[0] if len(agreed) == 1 else "cannot be judged"  # type: ignore[assignment]
        return Finding(verdict=verdict, measured=f"Against the tuned rate, {'; '.join(told)}.", figures=figures)

    return judge


def half_the_state(results: Results) -> Finding:
    """Judges the bytes of Spectra's state over AdamW's."""
    entries = results["recipes"]["recipes"]
    share = entries["spectra"]["state_bytes"] / entries["adamw"]["state_bytes"]
    return Finding(
        verdict="holds" if share < 0.9 else "does not hold",
        measured=f"Spectra's state takes {100 * share:.0f} % of the bytes of AdamW's.",
        figures={"share": share},
        caveat="Embeddings and head keep AdamW's state and are most of a small model; of matrices alone it is 51 %.",
    )


def faster_than_muon(results: Results) -> Finding:
    """Judges the time of Spectra's step against Muon's, as each ran in training."""
    left, right = runs_of(results, "recipes", "spectra"), runs_of(results, "recipes", "muon")
    if len(left) < 2:
        return NO_INTERVAL
    ratio = mean_interval([right[seed]["optimizer_ms"] / left[seed]["optimizer_ms"] for seed in left])
    return Finding(
        verdict="holds" if ratio.low > 1 else "does not hold" if ratio.high < 1 else "cannot be judged",
        measured=f"Muon's optimizer step takes {ratio.shown('.1f')} times as long as Spectra's.",
        figures={"ratio": ratio},
        caveat="Times of this machine, with whatever else ran on it; Muon here is this library's accurate one.",
    )


def rank_matters_little(results: Results) -> Finding:
    """Judges the loss over rank ratios from 0.5 to 10 %."""
    told, worst, figures = [], [], {}
    for rank in RANKS:
        difference = paired(results, (f"rank-{rank:g}", "spectra"), ("recipes", "spectra"))
        if difference is None:
            return NO_INTERVAL
        figures[f"rank_{rank:g}"] = difference
        worst.append(difference)
        told.append(f"{100 * rank:g} %: {difference.shown('+.4f')}")
    gain = paired(results, ("recipes", "spectra"), ("recipes", "adamw"))
    allowed = abs(gain.mean) if gain else 0.0
    far = any(each.low > allowed for each in worst)
    near = all(each.high < max(allowed, 0.01) for each in worst)
    return Finding(
        verdict="does not hold" if far else "holds" if near else "cannot be judged",
        measured=f"Final loss against a rank ratio of 1.5 %: {'; '.join(told)}.",
        figures=figures,
        caveat="Holds if no ratio costs more than what Spectra gains over AdamW.",
    )


def rare_tokens(results: Results) -> Finding:
    """Judges that Spectra's gain over AdamW is larger on rare tokens than on frequent ones."""
    left, right = runs_of(results, "recipes", "spectra"), runs_of(results, "recipes", "adamw")
    gains: list[list[float]] = []
    for seed, run in left.items():
        own, other = run["val_loss_by_frequency"], right[seed]["val_loss_by_frequency"]
        if not own or any(value is None for value in (*own.values(), *other.values())):
            return NO_INTERVAL
        gains.append([own[ranks] - other[ranks] for ranks in own])
    if len(gains) < 2:
        return NO_INTERVAL
    gap = mean_interval([gain[-1] - gain[0] for gain in gains])
    rare, frequent = (mean_interval([gain[place] for gain in gains]) for place in (-1, 0))
    return Finding(
        verdict=by_sign(gap),
        measured=f"Loss of spectra minus adamw's: {rare.shown('+.3f')} on the rarest tokens, "
        f"{frequent.shown('+.3f')} on the most frequent ones.",
        figures={"rare": rare, "frequent": frequent, "gap": gap},
        caveat="Each end holds an equal share of the training text.",
    )


def over_sizes(recipe: str) -> Callable[[Results], Finding]:
    """Judges a recipe's difference to AdamW at every size and on every text that was trained."""

    def judge(results: Results) -> Finding:
        told, verdicts, figures = [], set(), {}
        for study, summary in results.items():
            if study in ("recipes", "python") or study.startswith("size-"):
                difference = paired(results, (study, recipe), (study, "adamw"))
                if difference is None:
                    continue
                where = f"{summary['config']['model']['preset']}{', Python sources' if study == 'python' else ''}"
                told.append(f"{where}: {difference.shown('+.3f')}")
                figures[where] = difference
                verdicts.add(by_sign(difference))
        if len(told) < 2:
            return Finding(verdict="cannot be judged", measured="This budget trains one size on one text.")
        verdict: Verdict = verdicts.pop() if len(verdicts) == 1 else "cannot be judged"
        return Finding(
            verdict=verdict, measured=f"Final loss of {recipe} minus adamw's: {'; '.join(told)}.", figures=figures
        )

    return judge


def spikes_hold_the_energy(results: Results) -> Finding:
    """Judges the share of a gradient's energy in its leading 1.5 % of directions, over training and sizes."""
    told, lowest, figures = [], [], {}
    for study, summary in results.items():
        shares = summary.get("spike_shares")
        if (study != "recipes" and not study.startswith("size-")) or not shares:
            continue
        early, late = (
            median(part) for part in (shares[: max(1, len(shares) // 3)], shares[-max(1, len(shares) // 3) :])
        )
        where = summary["config"]["model"]["preset"]
        told.append(f"{where}: {100 * early:.0f} % in the first third of training and {100 * late:.0f} % in the last")
        figures[where] = [early, late]
        lowest.append(min(early, late))
    if not told:
        return Finding(verdict="cannot be judged", measured="The runs hold no measurements of gradients.")
    return Finding(
        verdict="holds" if min(lowest) > 0.5 else "does not hold",
        measured="Share of a gradient's energy in its leading 1.5 % of directions, median of matrices: "
        f"{'; '.join(told)}.",
        figures=figures,
    )


MAIN = ("recipes",)
RATES = (*MAIN, *(f"rate-x{times}" for times in ROBUST_FACTORS))
RANKINGS = (*MAIN, *(f"rank-{rank:g}" for rank in RANKS))
TREND = (*MAIN, "size-2m", "size-1m", "size-tiny", "python")

CHECKS = {
    **{f"clip-{base}": Check(judge=better(f"{base}+clip", base), studies=MAIN) for base in CLIPPED},
    "clip-muon": Check(judge=no_worse("adamw+clip", "muon"), studies=MAIN),
    "clip-weights": Check(judge=smaller("adamw+clip", "adamw", "weight_norm", "Norm"), studies=MAIN),
    "clip-spectral-norm": Check(
        judge=smaller("adamw+clip", "adamw", "largest_singular_value", "Largest singular value"), studies=MAIN
    ),
    "clip-rates": Check(judge=safe_rates("adamw+clip"), studies=RATES),
    "clip-hard": Check(judge=no_worse_than_variant("adamw+clip", "hard"), studies=(*MAIN, "hard")),
    "clip-scope": Check(judge=better_than_variant("adamw+clip", "matrices"), studies=(*MAIN, "matrices")),
    "pre-clip-training": Check(judge=better("adamw+preclip", "adamw"), studies=MAIN),
    "clip-sizes": Check(judge=over_sizes("adamw+clip"), studies=TREND),
    "spike-tokens": Check(judge=fewer_tokens("spectra", "adamw", 0.3), studies=MAIN),
    "spike-share": Check(judge=spikes_hold_the_energy, studies=TREND),
    "spike-state": Check(judge=half_the_state, studies=MAIN),
    "spike-time": Check(judge=faster_than_muon, studies=MAIN),
    "spike-rates": Check(judge=safe_rates("spectra"), studies=RATES),
    "spike-rank": Check(judge=rank_matters_little, studies=RANKINGS),
    "spike-rare": Check(judge=rare_tokens, studies=MAIN),
    "spike-sizes": Check(judge=over_sizes("spectra"), studies=TREND),
    "shrink-adamw": Check(judge=fewer_tokens("adamw+shrink", "adamw", 0.07), studies=MAIN),
    "shrink-muon": Check(judge=fewer_tokens("muon+shrink", "muon", 0.02), studies=MAIN),
    "mix-shrink-clip": Check(judge=better("adamw+shrink+clip", "adamw+clip"), studies=MAIN),
    "mix-spectra-clip": Check(judge=better("spectra+clip", "spectra"), studies=MAIN),
    "mix-average-clip": Check(judge=better("ademamix+clip", "adamw+clip"), studies=MAIN),
}
