"""What spectra say, in sentences that quote the numbers: of the spike, the noise, its tails, operators and weights.

It says what is not seen too: too few batches, tails that are Gaussian, operators that are worth no more than scaling.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

__all__ = ["SIDE_BY_SIDE", "headline", "reading", "reading_text", "side_by_side"]

Summary = dict[str, Any]
Matrix = dict[str, Any]

HEAVY = 0.01
"""Nats per entry by which a fit must beat the Gaussian before its tail is called heavy."""

MIDDLE_ENERGY = 0.5
"""The share of the energy at which operators are quoted."""

WORTH = 1.05
"""Signal squared over noise from which an operator is said to do more than scaling."""


def reading_text(summary: Summary, title: str) -> str:
    """The whole reading as Markdown."""
    lines = [f"# Spectra: {title}", ""]
    if len(summary["subjects"]) > 1:
        lines += ["## Side by side", "", SIDE_BY_SIDE, "", *(f"- {line}" for line in side_by_side(summary)), ""]
    for name, subject in summary["subjects"].items():
        lines += [f"## {name}", "", *(f"- {line}" for line in reading(subject)), ""]
    lines += [f"The numbers are in `spectrum.json`, pictures of them beside it. {HOW}", ""]
    return "\n".join(lines)


HOW = "What each number means, and how it is debiased, is in docs/spectrum.md."


SIDE_BY_SIDE = "Medians over the matrices of each."


def headline(summary: Summary) -> str:
    """One sentence for the top of the page."""
    subjects = summary["subjects"]
    found = {name: measured(subject) for name, subject in subjects.items()}
    name = next((name for name, matrices in found.items() if matrices), None)
    if name is None:
        low, high = span(each["weight"]["stable_rank"] for subject in subjects.values() for each in all_of(subject))
        return f"Weights alone: their stable ranks lie between {low:.3g} and {high:.3g}."
    share = middle(each["gradient"]["spike_share"] for each in found[name])
    return (
        f"The top 1.5% of the singular directions hold {share:.0%} of a batch's gradient energy in the median matrix "
        f"of {name}; {tail_headline(found[name])}."
    )


def tail_headline(matrices: Sequence[Matrix]) -> str:
    heavy = [each for each in matrices if gain_over_gaussian(each) > HEAVY]
    if not heavy:
        return "the entries of its noise are about Gaussian"
    within = middle(each["tails"]["kurtosis"]["within"] for each in heavy)
    if within < 1:
        return (
            "its noise has heavy tails, but from entries of unlike variance: one entry over batches is about Gaussian"
        )
    return "its noise has heavy tails, in single entries over batches too"


def reading(subject: Summary) -> list[str]:
    """Sentences on one subject."""
    matrices = measured(subject)
    makers: tuple[Callable[[Summary, list[Matrix]], Iterable[str]], ...] = (
        spike, second_moment, over_training, directions, signal, subspaces, localisation, tails, operators, thresholds,
    )  # fmt: skip
    lines = [line for make in makers if matrices for line in make(subject, matrices)]
    return lines + weights(subject) + caveats(subject, matrices)


def spike(subject: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """Energy in the spike, of gradient, mean and momentum."""
    shares = [each["gradient"]["spike_share"] for each in matrices]
    low, high = span(shares)
    where = max(matrices, key=lambda each: each["gradient"]["spike_share"])
    yield (
        f"The spike (the top 1.5% of the singular directions) holds {low:.0%} to {high:.0%} of the energy of a batch's "
        f"gradient, {middle(shares):.0%} in the median of {len(matrices)} matrices, most in {label(where)}. In the "
        f"mean gradient it is {middle(each['mean_gradient']['spike_share'] for each in matrices):.0%}."
    )
    held = [each["momentum"]["spike_share"] for each in matrices if each.get("momentum")]
    if held:
        yield f"In the optimizer's momentum (`{subject['momentum']}`) the spike holds {middle(held):.0%} in the median."
    else:
        yield "There is no optimizer state here, so nothing is said of momentum."


def second_moment(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """What the spike puts into E[g²]."""
    sums, entries, contractions = (
        [each["second_moment"][key] for each in matrices] for key in ("share", "median_share", "contraction")
    )
    yield (
        f"Of E[g²], the second moment that Adam divides by, the spike holds {middle(sums):.0%} of the sum over "
        f"entries, but {middle(entries):.0%} of it in the median entry. By that it shortens the tail's update to "
        f"{middle(contractions):.0%} of what it would be without a spike ({min(contractions):.0%} at the least)."
    )


def over_training(subject: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """How the spike's share changes between the first stage and the last."""
    stages = subject["stages"]
    if len(stages) < 2:
        yield (
            "Only one stage of training is here: spectra over training need a run with a monitor (monitor.jsonl with "
            "exact spectra)."
        )
        return
    first, last = (
        [each["gradient"]["spike_share"] for each in stages[place]["matrices"].values() if "gradient" in each]
        for place in (0, -1)
    )
    if first and last:
        yield (
            f"Over training the spike's share of a single gradient goes from {middle(first):.0%} at step "
            f"{stages[0]['step']:,} to {middle(last):.0%} at step {stages[-1]['step']:,}, medians over matrices."
        )


def directions(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """Whether smaller directions vary more."""
    known = [[group for group in each["directions"] if group["relative"]] for each in matrices]
    ends = [(groups[0], groups[-1]) for groups in known if len(groups) > 1]
    lost = sum(any(group["relative"] is None for group in each["directions"]) for each in matrices)
    if not ends:
        yield "No singular direction of the mean stands out of the noise enough to tell its relative variance."
        return
    first = middle(one["relative"] for one, _ in ends)
    last = middle(two["relative"] for _, two in ends)
    rising = sum(two["relative"] > one["relative"] for one, two in ends)
    words = (
        f"Smaller directions vary more over batches: variance over squared mean is {first:.2g} for the leading "
        f"direction and {last:.2g} for the last ones that can be told (medians); it rises in {rising} of {len(ends)} "
        f"matrices."
        if rising > len(ends) / 2
        else f"Smaller directions do not vary more over batches here: variance over squared mean rises with the rank "
        f"in {rising} of {len(ends)} matrices only ({first:.2g} to {last:.2g}, medians)."
    )
    yield words + (
        f" In {lost} matrices some directions are lost in noise, so that only a bound is known." if lost else ""
    )


def signal(subject: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """How large the mean is against the noise, and what of it can be told."""
    ratios = [each["mean_gradient"]["energy"]["value"] / each["noise"]["energy"] for each in matrices]
    unsure = sum(
        each["mean_gradient"]["energy"]["value"] < 2 * each["mean_gradient"]["energy"]["error"] for each in matrices
    )
    errors = middle(
        each["mean_gradient"]["energy"]["error"] / abs(each["mean_gradient"]["energy"]["value"]) for each in matrices
    )
    above = [each["mean_gradient"]["above_floor"] for each in matrices]
    text = subject["text"]
    yield (
        f"The mean gradient G over {text['batches']} batches has {middle(ratios):.0%} of the noise's energy in the "
        f"median (‖G‖²/E‖N‖² from {min(ratios):.1%} to {max(ratios):.0%}; standard error of ‖G‖² about {errors:.0%})."
        + (f" In {unsure} of {len(matrices)} matrices ‖G‖² is not told apart from zero." if unsure else "")
    )
    yield (
        f"Of G's singular values {min(above)} to {max(above)} stand above the largest that noise alone gives at this "
        f"many batches; of the others none can be told from noise by its size alone."
    )


def subspaces(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """Whether noise and signal share their leading directions."""
    left, right, again_left, again_right = (
        [each["noise"][side]["share"]["value"] / each["noise"][side]["expected"] for each in matrices]
        for side in ("left", "right", "recurring_left", "recurring_right")
    )
    shares = [max(each["noise"][side]["share"]["value"] for side in ("left", "right")) for each in matrices]
    both = middle([*left, *right])
    if both > 2:
        yield (
            f"Noise and signal share leading directions: ‖UᵀU'‖²/k is {middle(shares):.2f} on the side where it is "
            f"larger (median), {middle(left):.0f} times chance on the left and {middle(right):.0f} times on the right. "
            f"An operator on the leading directions therefore meets both."
        )
    else:
        yield f"The leading directions of noise and signal overlap about as by chance ({both:.1f} times)."
    if middle([*again_left, *again_right]) > 2:
        yield (
            f"The noise's own leading directions come back: their overlap between two batches is "
            f"{middle(again_left):.0f} times chance on the left, {middle(again_right):.0f} times on the right. Noise "
            f"of low rank in fresh directions each time, as clipping's theory has it, is not what is seen."
        )
    else:
        yield "The noise's own leading directions are fresh on every batch, as clipping's theory has it."


def localisation(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """Whether the noise's norm sits on single entries."""
    found = [each["noise"]["localisation"]["value"] for each in matrices]
    ratios = [each["noise"]["localisation"]["value"] / each["noise"]["gaussian_localisation"] for each in matrices]
    low, high = span(found)
    verdict = (
        "some of it is localised, so that entries and spectrum are tied"
        if high > 0.5
        else "far from the 1 of noise on single entries: shrinking entries does not control the spectrum here"
    )
    yield (
        f"Localisation max|N|/‖N‖₂ is {low:.2f} to {high:.2f}, {middle(ratios):.1f} times a Gaussian's in the median: "
        f"{verdict}."
    )


def tails(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """Which density fits the noise's entries, and whether single entries are heavy-tailed."""
    best: dict[str, int] = {}
    for each in matrices:
        best[each["tails"]["fits"][0]["model"]] = best.get(each["tails"]["fits"][0]["model"], 0) + 1
    counts = ", ".join(f"{model} in {count}" for model, count in sorted(best.items(), key=lambda item: -item[1]))
    gains = [gain_over_gaussian(each) for each in matrices]
    line = (
        f"Of the fits to the noise's entries the best by Akaike's criterion is {counts} of {len(matrices)} matrices; "
        f"it beats the Gaussian by {middle(gains):.2g} nats per entry in the median ({max(gains):.2g} at most)."
    )
    freedoms = [
        fit["parameters"]["freedom"]
        for each in matrices
        for fit in each["tails"]["fits"][:1]
        if fit["model"] == "student"
    ]
    if freedoms:
        line += f" Student's ν is {middle(freedoms):.2g} in the median, {min(freedoms):.2g} at the least."
    yield line
    pooled, within = (middle(each["tails"]["kurtosis"][key] for each in matrices) for key in ("pooled", "within"))
    if pooled < 0.5:
        yield f"Excess kurtosis is {pooled:.2g}: no heavy tail."
    elif within < 1:
        yield (
            f"But the tail is mostly between entries: excess kurtosis is {pooled:.2g} with all entries together, and "
            f"{within:.2g} within an entry over batches (medians; 0 for a Gaussian). Entries of unlike variance look "
            f"like a heavy tail; rare outliers of one entry are not seen."
        )
    else:
        yield (
            f"Single entries are heavy-tailed too: excess kurtosis within an entry over batches is {within:.2g} in the "
            f"median, {pooled:.2g} with all entries together."
        )


def operators(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """What each operator leaves at half of the energy, and whether any is worth more than scaling."""
    parts, best = [], {}
    for operator in dict.fromkeys(each["operator"] for each in matrices[0]["operators"]):
        chosen = [
            min(
                (entry for entry in each["operators"] if entry["operator"] == operator),
                key=lambda entry: abs(entry["energy"] - MIDDLE_ENERGY),
            )
            for each in matrices
        ]
        kept, noise, gain = (
            middle(values)
            for values in (
                (each["signal"]["value"] for each in chosen),
                (each["noise"] for each in chosen),
                (each["gain"] for each in chosen),
            )
        )
        parts.append(f"{operator} {kept:.0%} and {noise:.0%} (gain {gain:.2f})")
        best[operator] = max(
            (entry["gain"] or 0.0) for each in matrices for entry in each["operators"] if entry["operator"] == operator
        )
    yield (
        f"With half of the energy left, of G and of N's variance there remain, in the median matrix: "
        f"{'; '.join(parts)}. Gain is signal squared over noise, 1 for plain scaling."
    )
    winners = {operator: gain for operator, gain in best.items() if gain > WORTH}
    if winners:
        listed = ", ".join(f"{operator} up to {gain:.2f}" for operator, gain in winners.items())
        yield f"More of the signal than scaling leaves, for the noise left, is found with {listed} in some matrix."
    else:
        yield (
            f"No operator leaves more of the signal for the noise than scaling does, in any matrix at any strength "
            f"(the best gain is {max(best.values()):.2f}): as a filter of this noise none earns its place. What they "
            f"do to optimization is another question."
        )


def thresholds(_: Summary, matrices: list[Matrix]) -> Iterable[str]:
    """What soft clipping leaves at the thresholds that were asked for."""
    for place, threshold in enumerate(matrices[0]["thresholds"]):
        found = [each["thresholds"][place] for each in matrices]
        yield (
            f"Soft clipping at c = {threshold['strength']:g} leaves {middle(each['energy'] for each in found):.0%} of "
            f"the energy, {middle(each['signal']['value'] for each in found):.0%} of G and "
            f"{middle(each['noise'] for each in found):.0%} of N's variance (medians); "
            f"{middle(each['above'] for each in found):.1%} of the singular values are above c."
        )


def weights(subject: Summary) -> list[str]:
    """Norms of the weights."""
    every = all_of(subject)
    low, high = span(each["weight"]["spectral_norm"] for each in every)
    ranks = span(each["weight"]["stable_rank"] for each in every)
    return [
        f"Weights: the norm of all is {subject['weight_norm']:.4g}; the matrices here have largest singular values "
        f"from {low:.3g} to {high:.3g} and stable ranks from {ranks[0]:.3g} to {ranks[1]:.3g}."
    ]


def caveats(subject: Summary, matrices: list[Matrix]) -> list[str]:
    """What limits all of the above."""
    lines = []
    text = subject["text"]
    if text is not None and text["batches"] < 16:
        lines.append(
            f"{text['batches']} batches are few: take shares of the mean gradient, and of directions, as hints."
        )
    if text is not None and text["repeated"]:
        lines.append(
            f"The text has {text['windows']:,} sequences, fewer than {text['batches']} batches of "
            f"{text['batch_size']}: batches repeat, so that noise looks smaller than it is."
        )
    silent = len(subject["matrices"]) - len(matrices)
    if text is not None and silent:
        lines.append(f"{silent} matrices had no gradient on any batch, such as experts that no token met.")
    return lines


def side_by_side(summary: Summary) -> list[str]:
    """Several subjects against each other, in medians over their matrices."""
    lines = []
    for name, subject in summary["subjects"].items():
        top, rank, share = (
            middle(each["weight"][key] for each in all_of(subject))
            for key in ("spectral_norm", "stable_rank", "spike_share")
        )
        lines.append(
            f"`{name}`: {gradients_in_short(measured(subject))}weight norm {subject['weight_norm']:.4g}; of the "
            f"weights largest singular value {top:.3g}, stable rank {rank:.3g}, spike share {share:.0%}."
        )
    return lines


def gradients_in_short(matrices: list[Matrix]) -> str:
    """The medians that tell subjects apart; nothing where only weights were measured."""
    if not matrices:
        return ""
    share, overlap, localised, gain = (
        middle(values)
        for values in (
            (each["gradient"]["spike_share"] for each in matrices),
            (max(each["noise"][side]["share"]["value"] for side in ("left", "right")) for each in matrices),
            (each["noise"]["localisation"]["value"] for each in matrices),
            (gain_over_gaussian(each) for each in matrices),
        )
    )
    return (
        f"spike {share:.0%} of a gradient's energy, overlap of noise and signal {overlap:.2f}, localisation "
        f"{localised:.2f}, tails {gain:.2g} nats an entry better than a Gaussian; "
    )


def gain_over_gaussian(matrix: Matrix) -> float:
    """Nats per entry by which the best fit beats the Gaussian."""
    likelihoods = {fit["model"]: fit["log_likelihood"] for fit in matrix["tails"]["fits"]}
    return float(max(likelihoods.values()) - likelihoods["gaussian"])


def measured(subject: Summary) -> list[Matrix]:
    return [each for each in subject["matrices"].values() if each.get("gradient")]


def all_of(subject: Summary) -> list[Matrix]:
    return list(subject["matrices"].values())


def label(matrix: Matrix) -> str:
    return f"`{matrix['kind']}`" + ("" if matrix["layer"] is None else f" of layer {matrix['layer']}")


def middle(values: Iterable[float | None]) -> float:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return median(known) if known else float("nan")


def span(values: Iterable[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (float("nan"), float("nan"))
