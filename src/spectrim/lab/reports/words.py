"""Words that reports derive from numbers: headlines, verdicts, and the reading of spectra with a column of verdicts."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from spectrim.lab.recipes.names import BASELINE
from spectrim.lab.tables import value_of

__all__ = [
    "comparison_headline",
    "reading_notes",
    "reading_rows",
    "side_by_side_rows",
    "spectrum_headline",
    "sweep_headline",
    "verdict",
]

Summary = dict[str, Any]


def verdict(entry: Summary, base: float) -> str:
    """ "lower", "higher" or "diverged" against AdamW, and what limits that: one seed, or zero in the interval."""
    if entry["final_loss"] is None:
        return "diverged"
    low, high = (value_of(entry, f"difference_to_adamw.{end}") for end in ("low", "high"))
    limit = ", one seed" if low is None else ", not significant" if low <= 0 <= high else ""
    return ("lower" if entry["final_loss"] < base else "higher") + limit


def comparison_headline(summary: Summary) -> str:
    """The recipe with the lowest final loss among those surely below AdamW, or else among all."""
    recipes = summary["recipes"]
    losses = {name: entry["final_loss"] for name, entry in recipes.items() if entry["final_loss"] is not None}
    base = losses.pop(BASELINE, None)
    if not losses:
        return "Every recipe diverged." if base is None else f"AdamW ends at {base:.4f}; no other recipe ended."
    name = min(losses, key=lambda name: (base is not None and verdict(recipes[name], base) != "lower", losses[name]))
    if base is None:
        return f"{name} ends lowest, at {losses[name]:.4f}; AdamW has no final loss to compare it with."
    entry, paired = recipes[name], recipes[name].get("difference_to_adamw") or {}
    facts = [verdict(entry, base), f"{losses[name] - base:+.4f}"]
    if paired.get("low") is not None:
        facts.append(f"95\u00a0% interval {paired['low']:+.4f} to {paired['high']:+.4f}, {paired['pairs']} seeds")
    if entry["tokens_to_adamw"] is not None:
        facts.append(f"AdamW's loss after {entry['tokens_to_adamw']:.0%} of the tokens")
    return f"{name} ends at {losses[name]:.4f}, AdamW at {base:.4f}: {'; '.join(facts)}."


def sweep_headline(summary: Summary) -> str:
    """The recipe with the lowest loss, and its learning rate."""
    best = {name: entry["best"] for name, entry in summary["recipes"].items() if entry["best"]}
    if not best:
        return "No trial has reached its end yet."
    name, *others = sorted(best, key=lambda name: best[name]["final_loss"])
    loss, rate = (best[name][key] for key in ("final_loss", "lr"))
    second = "".join(f"; {other} ends {best[other]['final_loss'] - loss:.4f} above it" for other in others[:1])
    return f"{name} ends lowest, at {loss:.4f} with learning rate {rate:.2g}{second}."


SPIKE = "spike's share of a gradient's energy"
TAIL = "best tail fit, nats per entry over Gaussian"
SIDES = ("left", "right", "recurring_left", "recurring_right")
QUANTITIES: tuple[tuple[Any, ...], ...] = (
    (SPIKE, ".0%", "gradient.spike_share"),
    ("spike's share of the mean gradient G", ".0%", "mean_gradient.spike_share"),
    ("spike's share of the momentum", ".0%", "momentum.spike_share"),
    ("spike's share of Adam's E[g²], sum of entries", ".0%", "second_moment.share"),
    ("spike's share of E[g²], median entry", ".0%", "second_moment.median_share"),
    ("tail's update, against no spike", ".0%", "second_moment.contraction", 0.9, "hardly shortened", "shortened"),
    ("‖G‖²/E‖N‖², N the noise", ".1%", "signal_to_noise", 1, "more signal than noise", "more noise than signal"),
    ("singular values of G above the noise", ".0f", "mean_gradient.above_floor"),
    ("variance over mean², leading direction", ".2g", "leading_variance"),
    ("variance over mean², last known direction", ".2g", "last_variance"),
    ("overlap of N and G, times chance", ".1f", "overlap", 2, "directions shared", "by chance"),
    ("overlap of N between batches, times chance", ".1f", "recurrence", 2, "directions recur", "fresh on every batch"),
    ("localisation max|N|/‖N‖₂", ".2f", "noise.localisation.value", 0.5, "on few entries", "not on single entries"),
    (TAIL, ".2g", "gain_over_gaussian", 0.01, "heavier than Gaussian", "about Gaussian"),
    ("excess kurtosis, all entries together", ".2g", "tails.kurtosis.pooled", 0.5, "heavy tail", "no heavy tail"),
    ("excess kurtosis of an entry over batches", ".2g", "tails.kurtosis.within", 1, "heavy tails", "unlike variances"),
    ("largest singular value of weights", ".3g", "weight.spectral_norm"),
    ("stable rank of weights", ".3g", "weight.stable_rank"),
)
"""Name, format and dotted key in a matrix or in :func:`derived`; then a limit, and the verdicts above and below it."""


def derived(matrix: Summary) -> Summary:
    """Ratios that ``spectrum.json`` does not hold itself."""
    noise, variances = matrix["noise"], [each["relative"] for each in matrix["directions"] if each["relative"]]
    chance = {side: noise[side]["share"]["value"] / noise[side]["expected"] for side in SIDES}
    likelihoods = {fit["model"]: fit["log_likelihood"] for fit in matrix["tails"]["fits"]}
    return {
        "signal_to_noise": matrix["mean_gradient"]["energy"]["value"] / noise["energy"],
        "leading_variance": variances[0] if len(variances) > 1 else None,
        "last_variance": variances[-1] if len(variances) > 1 else None,
        "overlap": median((chance["left"], chance["right"])),
        "recurrence": median((chance["recurring_left"], chance["recurring_right"])),
        "gain_over_gaussian": max(likelihoods.values()) - likelihoods["gaussian"],
    }


def with_gradients(subject: Summary) -> list[Summary]:
    return [matrix for matrix in subject["matrices"].values() if matrix.get("gradient")]


def row(name: str, form: str, values: Sequence[float], verdict: str) -> list[str]:
    return [name, *(format(value, form) for value in (median(values), min(values), max(values))), verdict]


def reading_rows(subject: Summary) -> list[list[str]]:
    """Median, range over matrices and verdict of every measured quantity of one subject."""
    rows = [["quantity", "median", "least", "most", "verdict"]]
    matrices = [{**matrix, **derived(matrix)} for matrix in with_gradients(subject)]
    for name, form, key, *judge in QUANTITIES:
        group = subject["matrices"].values() if key.startswith("weight.") else matrices
        if values := [value for matrix in group if (value := value_of(matrix, key)) is not None]:
            rows.append(row(name, form, values, judge[1 if median(values) > judge[0] else 2] if judge else ""))
    for operator in dict.fromkeys(entry["operator"] for each in matrices[:1] for entry in each["operators"]):
        of_each = [[entry for entry in each["operators"] if entry["operator"] == operator] for each in matrices]
        half = [min(entries, key=lambda entry: abs(entry["energy"] - 0.5)) for entries in of_each]
        best = max(entry["gain"] or 0.0 for entries in of_each for entry in entries)
        left, noise = median(entry["signal"]["value"] for entry in half), median(entry["noise"] for entry in half)
        worth = f"better than scaling, up to {best:.2f}" if best > 1.05 else "no better than scaling"
        if gains := [entry["gain"] for entry in half if entry["gain"] is not None]:
            kept = f"G {left:.0%}, N {noise:.0%}: {worth}"
            rows.append(row(f"{operator} at half energy, G² over N", ".2f", gains, kept))
    for entries in zip(*(each["thresholds"] for each in matrices), strict=True):
        above = f"{median(entry['above'] for entry in entries):.1%} of singular values above c"
        name = f"soft clip at c = {entries[0]['strength']:g}, energy left"
        rows.append(row(name, ".1%", [each["energy"] for each in entries], above))
    return rows


def side_by_side_rows(subjects: dict[str, Summary]) -> list[list[str]]:
    """The medians of every subject beside each other."""
    medians = [{row[0]: row[1] for row in reading_rows(subject)[1:]} for subject in subjects.values()]
    names = dict.fromkeys(name for column in medians for name in column)
    return [["median", *subjects], *([name, *(column.get(name, "-") for column in medians)] for name in names)]


def spectrum_headline(summary: Summary) -> str:
    """The spike's share of a gradient's energy, and the tails of its noise."""
    for name, subject in summary["subjects"].items():
        rows = {row[0]: row for row in reading_rows(subject)}
        if SPIKE in rows:
            share, tails = rows[SPIKE][1], rows[TAIL][-1]
            return f"In {name}'s median matrix the spike holds {share} of a batch's gradient energy; noise: {tails}."
    return "Weights alone were measured."


def reading_notes(subject: Summary) -> list[str]:
    """Notes on changes over training and on limits of the numbers."""
    text, matrices, stages, notes = subject["text"], with_gradients(subject), subject["stages"], []
    if len(stages) > 1 and all(ends := [with_gradients(stage) for stage in (stages[0], stages[-1])]):
        first, last = (f"{median(each['gradient']['spike_share'] for each in end):.0%}" for end in ends)
        steps = f"from {first} at step {stages[0]['step']:,} to {last} at step {stages[-1]['step']:,}"
        notes.append(f"Over training the spike's share of a gradient goes {steps}.")
    if text:
        count, silent = text["batches"], len(subject["matrices"]) - len(matrices)
        momentum = not matrices or any(each.get("momentum") for each in matrices)
        limits = (
            (not momentum, "There is no optimizer state here, so the momentum is not known."),
            (len(stages) < 2, "Spectra over training need a run with a monitor; there is only one stage here."),
            (count < 16, f"{count} batches are few: shares of the mean gradient and of directions are hints."),
            (text["repeated"], f"Batches repeat {text['windows']:,} sequences of text, so noise looks too small."),
            (silent, f"{silent} matrices had no gradient on any batch, such as experts that no token met."),
        )
        notes += [note for holds, note in limits if holds]
    return notes
