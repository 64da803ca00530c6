"""Claims about training, judged from comparisons: rates and corrupted batches, costs, ranks, spectra and tails."""

from collections.abc import Callable
from statistics import median

from spectrim.lab.claims.claim import Check, Finding, Interval, Verdict, by_sign, mean_interval
from spectrim.lab.claims.paired import (
    NO_INTERVAL,
    Results,
    better,
    better_in,
    better_than_variant,
    fewer_tokens,
    less_harmed,
    no_worse,
    no_worse_than_variant,
    paired,
    runs_of,
    smaller,
)
from spectrim.lab.claims.settings import BUDGETS
from spectrim.lab.claims.studies import CORRUPTED

__all__ = ["CHECKS"]

CLIPPED = ("adamw", "signum", "ademamix", "mars")


def numbered(results: Results, prefix: str) -> list[tuple[float, str]]:
    """The studies whose names are a prefix and a number: the number and the name, in the order of the numbers."""
    return sorted((float(name.removeprefix(prefix)), name) for name in results if name.startswith(prefix))


def safe_rates(recipe: str) -> Callable[[Results], Finding]:
    """Judges that a recipe loses less than AdamW when its tuned learning rate is multiplied."""

    def judge(results: Results) -> Finding:
        told, verdicts, figures = [], [], {}
        for times, study in numbered(results, "rate-x"):
            verdict, harm, gap = less_harmed(results, study, recipe)
            told.append(f"at {times:g} times the rate {harm}")
            verdicts.append(verdict)
            if gap is not None:
                figures[f"gap_x{times:g}"] = gap
        agreed = {verdict for verdict in verdicts if verdict not in (None, "cannot be judged")}
        return Finding(
            verdict=agreed.pop() if len(agreed) == 1 else "cannot be judged",
            measured=f"Against the tuned rate, {'; '.join(told)}.",
            figures=figures,
        )

    return judge


def limits_damage(recipe: str) -> Callable[[Results], Finding]:
    """Judges that corrupted batches raise a recipe's loss by less than AdamW's."""

    def judge(results: Results) -> Finding:
        verdict, harm, gap = less_harmed(results, "corrupted", recipe)
        courses = "; ".join(f"{name}: {course_of(results, 'corrupted', name)}" for name in (recipe, "adamw"))
        return Finding(
            verdict=verdict or "cannot be judged",
            measured=f"With {100 * CORRUPTED:g} % of the batches replaced by random tokens {harm}. {courses}.",
            figures={} if gap is None else {"gap": gap},
            caveat="The gradient's global norm is clipped to 1 in all runs.",
        )

    return judge


def course_of(results: Results, study: str, recipe: str) -> str:
    """Loss spikes of a recipe over all seeds, the steps that they last, and diverged runs, in words."""
    courses = [run["dynamics"] for run in runs_of(results, study, recipe).values()]
    if any(course is None or course.get("spike_steps") is None for course in courses):
        return "loss spikes unknown"
    spikes, steps = (sum(course[key] for course in courses) for key in ("loss_spikes", "spike_steps"))
    diverged = sum(course["diverged"] for course in courses)
    length = f" of {steps / spikes:.1f} steps" if spikes else ""
    return f"{spikes} loss spikes{length}" + (f", {diverged} runs diverged" if diverged else "")


def at_equal_time(recipe: str) -> Callable[[Results], Finding]:
    """Judges that a recipe's loss is lower than AdamW's at the time when AdamW ends."""

    def judge(results: Results) -> Finding:
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
    for rank, study in numbered(results, "rank-"):
        difference = paired(results, (study, "spectra"), ("recipes", "spectra"))
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
        low, high = (f"{100 * end:.0f}" for end in summary["spike_range"])
        told.append(
            f"{where}: {100 * early:.0f} % in the first third of training and {100 * late:.0f} % in the last, where "
            f"single matrices have {low} to {high} %"
        )
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
        return Finding(verdict="cannot be judged", measured="The runs hold no measurements of gradients.")
    indices = known.values()
    return Finding(
        verdict="holds" if max(indices) < 2 else "does not hold" if min(indices) > 2 else "cannot be judged",
        measured="Tail index of a gradient's entries at the end of training, median of matrices: "
        f"{'; '.join(f'{where}: {index:.2f}' for where, index in known.items())}.",
        figures={"tail_index": list(indices)},
        caveat="Hill's estimate of the gradient, not of its noise alone; below 2 the variance is infinite.",
    )


def needs(*recipes: str, studies: tuple[str, ...] = ("recipes",)) -> dict[str, tuple[str, ...]]:
    """The same recipes in every study."""
    return dict.fromkeys(studies, recipes)


def versus(judge: Callable[[str, str], Callable[[Results], Finding]], recipe: str, baseline: str) -> Check:
    """Compares two recipes."""
    return Check(judge=judge(recipe, baseline), needs=needs(recipe, baseline))


def variant(judge: Callable[[str, str], Callable[[Results], Finding]], recipe: str, study: str) -> Check:
    """Compares a recipe with its variant in another study."""
    return Check(judge=judge(recipe, study), needs=needs(recipe, studies=("recipes", study)))


def corrupted_check(recipe: str) -> Check:
    """Compares what corrupted batches do to a recipe and to AdamW."""
    return Check(judge=limits_damage(recipe), needs=needs(recipe, "adamw", studies=("recipes", "corrupted")))


def studies_by(prefix: str, key: str) -> tuple[str, ...]:
    """The numbered studies of all budgets."""
    return tuple(
        f"{prefix}{number:g}" for number in sorted({n for each in BUDGETS.values() for n in getattr(each, key)})
    )


RATES = ("recipes", *studies_by("rate-x", "raised"))
RANKINGS = ("recipes", *studies_by("rank-", "ranks"))
TREND = ("recipes", "size-2m", "size-1m", "size-tiny", "python")
TAILS = ("recipes", *studies_by("batch-", "batches"), *studies_by("vocabulary-", "vocabularies"))

CHECKS = {
    **{f"clip-{base}": versus(better, f"{base}+clip", base) for base in CLIPPED},
    "clip-muon": versus(no_worse, "adamw+clip", "muon"),
    "clip-weights": Check(
        judge=smaller("adamw+clip", "adamw", "weight_norm", "Norm"), needs=needs("adamw+clip", "adamw")
    ),
    "clip-spectral-norm": Check(
        judge=smaller("adamw+clip", "adamw", "largest_singular_value", "Largest singular value"),
        needs=needs("adamw+clip", "adamw"),
    ),
    "clip-rates": Check(judge=safe_rates("adamw+clip"), needs=needs("adamw+clip", "adamw", studies=RATES)),
    "clip-hard": variant(no_worse_than_variant, "adamw+clip", "hard"),
    "clip-scope": variant(better_than_variant, "adamw+clip", "matrices"),
    "clip-corrupted": corrupted_check("adamw+clip"),
    "clip-time": Check(judge=at_equal_time("adamw+clip"), needs=needs("adamw+clip", "adamw")),
    "pre-clip-training": versus(better, "adamw+preclip", "adamw"),
    "pre-clip-corrupted": corrupted_check("adamw+preclip"),
    "clip-sizes": Check(judge=over_sizes("adamw+clip"), needs=needs("adamw+clip", "adamw", studies=TREND)),
    "spike-tokens": Check(judge=fewer_tokens("spectra", "adamw", 0.3), needs=needs("spectra", "adamw")),
    "spike-share": Check(judge=spikes_hold_the_energy, needs=needs("adamw", studies=TREND)),
    "spike-state": Check(judge=half_the_state, needs=needs("spectra", "adamw")),
    "spike-time": Check(judge=faster_than_muon, needs=needs("spectra", "muon")),
    "spike-seconds": Check(judge=at_equal_time("spectra"), needs=needs("spectra", "adamw")),
    "spike-rates": Check(judge=safe_rates("spectra"), needs=needs("spectra", "adamw", studies=RATES)),
    "spike-rank": Check(
        judge=rank_matters_little, needs=needs("spectra", studies=RANKINGS) | needs("spectra", "adamw")
    ),
    "spike-shaping": variant(better_than_variant, "spectra", "unshaped"),
    "spike-power": variant(no_worse_than_variant, "spectra", "power-5"),
    "spike-rare": Check(judge=rare_tokens, needs=needs("spectra", "adamw")),
    "spike-corrupted": corrupted_check("spectra"),
    "spike-sizes": Check(judge=over_sizes("spectra"), needs=needs("spectra", "adamw", studies=TREND)),
    "shrink-adamw": Check(judge=fewer_tokens("adamw+shrink", "adamw", 0.07), needs=needs("adamw+shrink", "adamw")),
    "shrink-muon": Check(judge=fewer_tokens("muon+shrink", "muon", 0.02), needs=needs("muon+shrink", "muon")),
    "shrink-tails": Check(judge=heavy_tails, needs=needs("adamw", studies=TAILS)),
    "shrink-small-batch": Check(
        judge=better_in("small-batch", "adamw+shrink", "adamw"),
        needs=needs("adamw+shrink", "adamw", studies=("small-batch",)),
    ),
    "shrink-corrupted": corrupted_check("adamw+shrink"),
    "mix-shrink-clip": versus(better, "adamw+shrink+clip", "adamw+clip"),
    "mix-spectra-clip": versus(better, "spectra+clip", "spectra"),
    "mix-average-clip": versus(better, "ademamix+clip", "adamw+clip"),
}
