"""Judges claims about training from comparisons: rates, corrupted batches, costs, ranks, spectra and tails."""

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from spectrim.lab.claims.claim import Check, Finding, Interval, Results, Verdict, by_sign, mean_interval
from spectrim.lab.claims.paired import (
    NO_INTERVAL,
    better,
    better_in,
    better_than_variant,
    fewer_tokens,
    less_harmed,
    no_worse,
    no_worse_than_variant,
    paired,
    ratio,
    runs_of,
    smaller,
)
from spectrim.lab.claims.settings import BUDGETS
from spectrim.lab.claims.studies import CORRUPTED

__all__ = ["CHECKS"]

UNMEASURED = Finding(verdict="cannot be judged", measured="The runs hold no measurements of gradients.")


def unanimous(verdicts: Iterable[Verdict | None]) -> Verdict:
    """The verdict that all of them agree on."""
    agreed = set(verdicts)
    return (agreed.pop() if len(agreed) == 1 else None) or "cannot be judged"


def numbered(results: Results, prefix: str) -> list[tuple[float, str]]:
    """Studies named by a prefix and a number: number and name, sorted by number."""
    return sorted((float(name.removeprefix(prefix)), name) for name in results if name.startswith(prefix))


def safe_rates(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that a multiplied learning rate raises a recipe's loss by less than the baseline's."""
    told, verdicts, figures = [], [], {}
    for times, study in numbered(results, "rate-x"):
        verdict, harm, gap = less_harmed(results, study, recipe, baseline)
        told.append(f"at {times:g} times the rate {harm}")
        verdicts.append(verdict)
        if gap is not None:
            figures[f"gap_x{times:g}"] = gap
    return Finding(
        verdict=unanimous(verdict for verdict in verdicts if verdict not in (None, "cannot be judged")),
        measured=f"Against the tuned rate, {'; '.join(told)}.",
        figures=figures,
    )


def limits_damage(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that corrupted batches raise a recipe's loss by less than the baseline's."""
    verdict, harm, gap = less_harmed(results, "corrupted", recipe, baseline)
    spikes = "; ".join(f"{name}: {spikes_of(results, 'corrupted', name)}" for name in (recipe, baseline))
    return Finding(
        verdict=verdict or "cannot be judged",
        measured=f"With {100 * CORRUPTED:g} % of the batches replaced by random tokens {harm}. {spikes}.",
        figures={} if gap is None else {"gap": gap},
        caveat="The gradient's global norm is clipped to 1 in all runs.",
    )


def spikes_of(results: Results, study: str, recipe: str) -> str:
    """Number and mean length of a recipe's loss spikes over all seeds, and its diverged runs, in words."""
    courses = [run["dynamics"] for run in runs_of(results, study, recipe).values()]
    if any(course is None or course.get("spike_steps") is None for course in courses):
        return "loss spikes unknown"
    spikes, steps, diverged = (
        sum(course[key] for course in courses) for key in ("loss_spikes", "spike_steps", "diverged")
    )
    length = f" of {steps / spikes:.1f} steps" if spikes else ""
    return f"{spikes} loss spikes{length}" + (f", {diverged} runs diverged" if diverged else "")


def at_equal_time(results: Results, recipe: str, _: str) -> Finding:
    """Judges that a recipe's loss is lower than AdamW's at the time when AdamW ends."""
    found = results["recipes"]["recipes"][recipe]["equal_time"]
    difference = found and found["difference"]
    if not difference or difference["low"] is None:
        return NO_INTERVAL
    interval = Interval(**{key: difference[key] for key in ("mean", "low", "high")})
    return Finding(
        verdict=by_sign(interval),
        measured=f"Loss of {recipe} when AdamW ends minus AdamW's: {interval.shown('+.4f')}, after "
        f"{100 * found['share']:.0f} % of its steps.",
        figures={"at_equal_time": interval},
        caveat="Times of this machine, with whatever else ran on it. A recipe that is cut off has not lowered its "
        "learning rate yet; spectrim compare --equal time gives each a schedule of its own.",
    )


def half_the_state(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that Spectra's state is smaller than AdamW's."""
    entries = results["recipes"]["recipes"]
    share = entries[recipe]["state_bytes"] / entries[baseline]["state_bytes"]
    return Finding(
        verdict="holds" if share < 0.9 else "does not hold",
        measured=f"Spectra's state takes {100 * share:.0f} % of the bytes of AdamW's.",
        figures={"share": share},
        caveat="Embeddings and head keep AdamW's state and are most of a small model; of matrices alone it is 51 %.",
    )


def faster_than_muon(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that Spectra's optimizer step takes less time in training than Muon's."""
    times = ratio(results, "optimizer_ms", baseline, recipe)
    if times is None:
        return NO_INTERVAL
    return Finding(
        verdict="holds" if times.low > 1 else "does not hold" if times.high < 1 else "cannot be judged",
        measured=f"Muon's optimizer step takes {times.shown('.1f')} times as long as Spectra's.",
        figures={"ratio": times},
        caveat="Times of this machine, with whatever else ran on it; Muon here is this library's accurate one.",
    )


def rank_matters_little(results: Results) -> Finding:
    """Judges that rank ratios from 0.5 to 10 % cost less than Spectra gains over AdamW."""
    told, figures = [], {}
    for rank, study in numbered(results, "rank-"):
        difference = paired(results, (study, "spectra"), ("recipes", "spectra"))
        if difference is None:
            return NO_INTERVAL
        figures[f"rank_{rank:g}"] = difference
        told.append(f"{100 * rank:g} %: {difference.shown('+.4f')}")
    gain = paired(results, ("recipes", "spectra"), ("recipes", "adamw"))
    allowed = abs(gain.mean) if gain else 0.0
    far = any(cost.low > allowed for cost in figures.values())
    near = all(cost.high < max(allowed, 0.01) for cost in figures.values())
    return Finding(
        verdict="does not hold" if far else "holds" if near else "cannot be judged",
        measured=f"Final loss against a rank ratio of 1.5 %: {'; '.join(told)}.",
        figures=figures,
        caveat="Holds if no ratio costs more than what Spectra gains over AdamW.",
    )


def rare_tokens(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that a recipe's gain over the baseline is larger on rare tokens than on frequent ones."""
    left, right = runs_of(results, "recipes", recipe), runs_of(results, "recipes", baseline)
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
        measured=f"Loss of {recipe} minus {baseline}'s: {rare.shown('+.3f')} on the rarest tokens, "
        f"{frequent.shown('+.3f')} on the most frequent ones.",
        figures={"rare": rare, "frequent": frequent, "gap": gap},
        caveat="Each end holds an equal share of the training text.",
    )


def over_sizes(results: Results, recipe: str, baseline: str) -> Finding:
    """Judges that a recipe ends at a lower loss than the baseline at every size and on every text that was trained."""
    told, figures = [], {}
    for study, summary in results.items():
        if study in ("recipes", "python") or study.startswith("size-"):
            difference = paired(results, (study, recipe), (study, baseline))
            if difference is None:
                continue
            where = f"{summary['config']['model']['preset']}{', Python sources' if study == 'python' else ''}"
            told.append(f"{where}: {difference.shown('+.3f')}")
            figures[where] = difference
    if len(told) < 2:
        return Finding(verdict="cannot be judged", measured="This budget trains one size on one text.")
    return Finding(
        verdict=unanimous(map(by_sign, figures.values())),
        measured=f"Final loss of {recipe} minus {baseline}'s: {'; '.join(told)}.",
        figures=figures,
    )


def spikes_hold_the_energy(results: Results) -> Finding:
    """Judges that the leading 1.5 % of directions hold most of a gradient's energy, over training and sizes."""
    told, lowest, figures = [], [], {}
    for study, summary in results.items():
        shares = summary.get("spike_shares")
        if (study != "recipes" and not study.startswith("size-")) or not shares:
            continue
        third = max(1, len(shares) // 3)
        early, late = median(shares[:third]), median(shares[-third:])
        where = summary["config"]["model"]["preset"]
        low, high = (f"{100 * end:.0f}" for end in summary["spike_range"])
        told.append(
            f"{where}: {100 * early:.0f} % in the first third of training and {100 * late:.0f} % in the last, where "
            f"single matrices have {low} to {high} %"
        )
        figures[where] = [early, late]
        lowest.append(min(early, late))
    if not told:
        return UNMEASURED
    return Finding(
        verdict="holds" if min(lowest) > 0.5 else "does not hold",
        measured="Share of a gradient's energy in its leading 1.5 % of directions, median of matrices: "
        f"{'; '.join(told)}.",
        figures=figures,
    )


def heavy_tails(results: Results) -> Finding:
    """Judges that the tail index of a gradient's entries is below 2, at every batch and vocabulary measured."""
    measured = {}
    for study, summary in results.items():
        if study == "recipes" or study.startswith(("batch-", "vocabulary-")):
            data = summary["config"]["data"]
            where = f"{data['batch_size']} sequences, vocabulary {data['vocabulary_size'] or 'default'}"
            measured[where] = summary["tail_index"]
    known = {where: index for where, index in measured.items() if index is not None}
    if not known:
        return UNMEASURED
    indices = known.values()
    return Finding(
        verdict="holds" if max(indices) < 2 else "does not hold" if min(indices) > 2 else "cannot be judged",
        measured="Tail index of a gradient's entries at the end of training, median of matrices: "
        f"{'; '.join(f'{where}: {index:.2f}' for where, index in known.items())}.",
        figures={"tail_index": list(indices)},
        caveat="Hill's estimate of the gradient, not of its noise alone; below 2 the variance is infinite.",
    )


def versus(
    judge: Callable[..., Finding], recipe: str, baseline: str, *more: Any, studies: tuple[str, ...] = ("recipes",)
) -> Check:
    """The check of two recipes that are trained in all of these studies; ``judge`` takes ``more`` after their names."""
    return Check(
        judge=lambda results: judge(results, recipe, baseline, *more), needs=dict.fromkeys(studies, (recipe, baseline))
    )


def variant(judge: Callable[[Results, str, str], Finding], recipe: str, study: str) -> Check:
    """The check of a recipe and its variant in another study."""
    return Check(
        judge=lambda results: judge(results, recipe, study), needs=dict.fromkeys(("recipes", study), (recipe,))
    )


def studies_by(prefix: str, key: str) -> tuple[str, ...]:
    """Names of the numbered studies of all budgets."""
    numbers = {number for budget in BUDGETS.values() for number in getattr(budget, key)}
    return tuple(f"{prefix}{number:g}" for number in sorted(numbers))


RATES = ("recipes", *studies_by("rate-x", "raised"))
RANKS = studies_by("rank-", "ranks")
TREND = ("recipes", "size-2m", "size-1m", "size-tiny", "python")
TAILS = ("recipes", *studies_by("batch-", "batches"), *studies_by("vocabulary-", "vocabularies"))
CORRUPTION = ("recipes", "corrupted")

CHECKS = {
    **{f"clip-{base}": versus(better, f"{base}+clip", base) for base in ("adamw", "signum", "ademamix", "mars")},
    "clip-muon": versus(no_worse, "adamw+clip", "muon"),
    "clip-weights": versus(smaller, "adamw+clip", "adamw", "weight_norm", "Norm"),
    "clip-spectral-norm": versus(smaller, "adamw+clip", "adamw", "largest_singular_value", "Largest singular value"),
    "clip-rates": versus(safe_rates, "adamw+clip", "adamw", studies=RATES),
    "clip-hard": variant(no_worse_than_variant, "adamw+clip", "hard"),
    "clip-scope": variant(better_than_variant, "adamw+clip", "matrices"),
    "clip-corrupted": versus(limits_damage, "adamw+clip", "adamw", studies=CORRUPTION),
    "clip-time": versus(at_equal_time, "adamw+clip", "adamw"),
    "pre-clip-training": versus(better, "adamw+preclip", "adamw"),
    "pre-clip-corrupted": versus(limits_damage, "adamw+preclip", "adamw", studies=CORRUPTION),
    "clip-sizes": versus(over_sizes, "adamw+clip", "adamw", studies=TREND),
    "spike-tokens": versus(fewer_tokens, "spectra", "adamw", 0.3),
    "spike-share": Check(judge=spikes_hold_the_energy, needs=dict.fromkeys(TREND, ("adamw",))),
    "spike-state": versus(half_the_state, "spectra", "adamw"),
    "spike-time": versus(faster_than_muon, "spectra", "muon"),
    "spike-seconds": versus(at_equal_time, "spectra", "adamw"),
    "spike-rates": versus(safe_rates, "spectra", "adamw", studies=RATES),
    "spike-rank": Check(
        judge=rank_matters_little, needs=dict.fromkeys(RANKS, ("spectra",)) | {"recipes": ("spectra", "adamw")}
    ),
    "spike-shaping": variant(better_than_variant, "spectra", "unshaped"),
    "spike-power": variant(no_worse_than_variant, "spectra", "power-5"),
    "spike-rare": versus(rare_tokens, "spectra", "adamw"),
    "spike-corrupted": versus(limits_damage, "spectra", "adamw", studies=CORRUPTION),
    "spike-sizes": versus(over_sizes, "spectra", "adamw", studies=TREND),
    "shrink-adamw": versus(fewer_tokens, "adamw+shrink", "adamw", 0.07),
    "shrink-muon": versus(fewer_tokens, "muon+shrink", "muon", 0.02),
    "shrink-tails": Check(judge=heavy_tails, needs=dict.fromkeys(TAILS, ("adamw",))),
    "shrink-small-batch": versus(better_in, "adamw+shrink", "adamw", "small-batch", studies=("small-batch",)),
    "shrink-corrupted": versus(limits_damage, "adamw+shrink", "adamw", studies=CORRUPTION),
    "mix-shrink-clip": versus(better, "adamw+shrink+clip", "adamw+clip"),
    "mix-spectra-clip": versus(better, "spectra+clip", "spectra"),
    "mix-average-clip": versus(better, "ademamix+clip", "adamw+clip"),
}
