"""Words that reports derive from numbers: headlines, and tables with a column of verdicts."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from spectrim.lab.recipes.names import BASELINE

__all__ = [
    "HOW",
    "comparison_headline",
    "reading_notes",
    "reading_rows",
    "side_by_side_rows",
    "spectrum_headline",
    "sweep_headline",
    "value_of",
    "verdict_rows",
]

Summary = dict[str, Any]
Rows = list[list[str]]


def value_of(entry: Summary, key: str | Callable[[Summary], Any]) -> Any:
    """A value by its dotted key, None if it is missing; or the result of a function of the entry."""
    if callable(key):
        return key(entry)
    value: Any = entry
    for part in key.split("."):
        value = value and value.get(part)
    return value


# -- A comparison, a sweep ---------------------------------------------------------------------------------------------


def certainty(entry: Summary) -> str:
    """What limits the difference to AdamW: a single seed, or an interval that contains zero."""
    paired = entry.get("difference_to_adamw") or {}
    if paired.get("low") is None:
        return "one seed"
    return "not significant" if paired["low"] <= 0 <= paired["high"] else ""


def verdict(entry: Summary, base: float) -> str:
    """ "lower", "higher" or "diverged" against AdamW, and the limits of that."""
    if entry["final_loss"] is None:
        return "diverged"
    return ", ".join(filter(None, ["lower" if entry["final_loss"] < base else "higher", certainty(entry)]))


def interval(paired: Summary | None) -> str:
    return "-" if not paired or paired["low"] is None else f"{paired['low']:+.4f} to {paired['high']:+.4f}"


def verdict_rows(summary: Summary) -> Rows:
    """A row for each recipe but AdamW, which they are compared with; empty if AdamW has no final loss."""
    recipes = summary["recipes"]
    base = recipes.get(BASELINE, {})
    target = base.get("final_loss")

    def show(value: float | None, form: str, absent: str = "-") -> str:
        return absent if value is None else format(value, form)

    def times(entry: Summary, key: str) -> str:
        return f"x{entry[key] / base[key]:.2f}" if entry.get(key) and base.get(key) else "-"

    rows = [
        {
            "recipe": name,
            "final loss": show(loss := entry["final_loss"], ".4f"),
            "difference to AdamW": show(None if loss is None else loss - target, "+.4f"),
            "95 % interval": interval(entry.get("difference_to_adamw")),
            "tokens to AdamW's loss": show(entry["tokens_to_adamw"], ".0%", "never"),
            "step time": times(entry, "step_ms"),
            "optimizer state": times(entry, "state_bytes"),
            "difference at AdamW's time": show(value_of(entry, "equal_time.difference.mean"), "+.4f"),
            "verdict": verdict(entry, target),
        }
        for name, entry in recipes.items()
        if target is not None and name != BASELINE
    ]
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def comparison_headline(summary: Summary) -> str:
    """The recipe with the lowest final loss among those surely below AdamW, or else among all."""
    recipes = summary["recipes"]
    losses = {name: entry["final_loss"] for name, entry in recipes.items() if entry["final_loss"] is not None}
    base = losses.get(BASELINE)
    others = [name for name in losses if name != BASELINE]
    if not others:
        return "Every recipe diverged." if base is None else f"AdamW ends at {base:.4f}; no other recipe ended."
    if base is None:
        lowest = min(others, key=losses.__getitem__)
        return f"{lowest} ends lowest, at {losses[lowest]:.4f}; AdamW has no final loss to compare it with."
    name = min(others, key=lambda name: (verdict(recipes[name], base) != "lower", losses[name]))
    entry, below = recipes[name], losses[name] < base
    paired, tokens = entry.get("difference_to_adamw"), entry["tokens_to_adamw"]
    apart = f"{abs(losses[name] - base):.4f} nats per token {'below' if below else 'above'} AdamW's {base:.4f}"
    reached = f" and reaches that loss after {tokens:.0%} of the tokens" if below and tokens is not None else ""
    known = f"95\u00a0% interval {interval(paired)}, {paired['pairs']} seeds" if paired and paired["pairs"] > 1 else ""
    sure = "; ".join(filter(None, [certainty(entry), known]))
    return f"{'' if below else 'No recipe ends below AdamW: '}{name} ends {apart}{reached} ({sure})."


def sweep_headline(summary: Summary) -> str:
    """The recipe with the lowest loss, and its learning rate."""
    best = {name: entry["best"] for name, entry in summary["recipes"].items() if entry["best"]}
    if not best:
        return "No trial has reached its end yet."
    name, *others = sorted(best, key=lambda name: best[name]["final_loss"])
    loss = best[name]["final_loss"]
    second = f"; {others[0]} ends {best[others[0]]['final_loss'] - loss:.4f} above it" if others else ""
    return (
        f"{name} ends lowest, at {loss:.4f} with learning rate {best[name]['lr']:.2g}{second}. Winners are also "
        f"lucky: compare them on other seeds."
    )


# -- Spectra -----------------------------------------------------------------------------------------------------------


def gain_over_gaussian(matrix: Summary) -> float:
    likelihoods = {fit["model"]: fit["log_likelihood"] for fit in matrix["tails"]["fits"]}
    return float(max(likelihoods.values()) - likelihoods["gaussian"])


def times_chance(*sides: str) -> Callable[[Summary], float]:
    return lambda m: median(m["noise"][side]["share"]["value"] / m["noise"][side]["expected"] for side in sides)


def relative_variance(place: int) -> Callable[[Summary], float | None]:
    def get(matrix: Summary) -> float | None:
        known = [group["relative"] for group in matrix["directions"] if group["relative"]]
        return known[place] if len(known) > 1 else None

    return get


def signal_to_noise(matrix: Summary) -> float:
    return float(matrix["mean_gradient"]["energy"]["value"] / matrix["noise"]["energy"])


SPIKE = "spike's share of a gradient's energy"
TAIL = "best tail fit, nats per entry over Gaussian"

# Name, format, dotted key or function of a matrix; then a limit, and the verdicts above and below it.
QUANTITIES: tuple[tuple[Any, ...], ...] = (
    (SPIKE, ".0%", "gradient.spike_share"),
    ("spike's share of the mean gradient G", ".0%", "mean_gradient.spike_share"),
    ("spike's share of the momentum", ".0%", "momentum.spike_share"),
    ("spike's share of Adam's E[g²], sum of entries", ".0%", "second_moment.share"),
    ("spike's share of E[g²], median entry", ".0%", "second_moment.median_share"),
    (*("tail's update, against no spike", ".0%", "second_moment.contraction"), 0.9, "hardly shortened", "shortened"),
    (*("‖G‖²/E‖N‖², N the noise", ".1%", signal_to_noise), 1, "more signal than noise", "more noise than signal"),
    ("singular values of G above the noise", ".0f", "mean_gradient.above_floor"),
    ("variance over mean², leading direction", ".2g", relative_variance(0)),
    ("variance over mean², last known direction", ".2g", relative_variance(-1)),
    ("overlap of N and G, times chance", ".1f", times_chance("left", "right"), 2, "directions shared", "by chance"),
    (
        *("overlap of N between batches, times chance", ".1f", times_chance("recurring_left", "recurring_right")),
        *(2, "directions recur", "fresh on every batch"),
    ),
    ("localisation max|N|/‖N‖₂", ".2f", "noise.localisation.value", 0.5, "on few entries", "not on single entries"),
    (TAIL, ".2g", gain_over_gaussian, 0.01, "heavier than Gaussian", "about Gaussian"),
    ("excess kurtosis, all entries together", ".2g", "tails.kurtosis.pooled", 0.5, "heavy tail", "no heavy tail"),
    (
        *("excess kurtosis of an entry over batches", ".2g", "tails.kurtosis.within"),
        *(1, "single entries heavy-tailed", "entries only differ in variance"),
    ),
)
WEIGHTS = (
    ("largest singular value of weights", ".3g", "weight.spectral_norm"),
    ("stable rank of weights", ".3g", "weight.stable_rank"),
)


def with_gradients(subject: Summary) -> list[Summary]:
    return [matrix for matrix in subject["matrices"].values() if matrix.get("gradient")]


def quantities(subject: Summary) -> Iterator[tuple[str, str, list[float], str]]:
    """Yield name, format, values over matrices and verdict of every measured quantity."""
    matrices = with_gradients(subject)
    for table, group in ((QUANTITIES, matrices), (WEIGHTS, list(subject["matrices"].values()))):
        for name, form, key, *judge in table:
            if values := [value for each in group if (value := value_of(each, key)) is not None]:
                yield name, form, values, judge[1 if median(values) > judge[0] else 2] if judge else ""
    for operator in dict.fromkeys(entry["operator"] for each in matrices[:1] for entry in each["operators"]):
        of_each = [[entry for entry in each["operators"] if entry["operator"] == operator] for each in matrices]
        half = [min(entries, key=lambda entry: abs(entry["energy"] - 0.5)) for entries in of_each]
        best = max(entry["gain"] or 0.0 for entries in of_each for entry in entries)
        left, noise = median(entry["signal"]["value"] for entry in half), median(entry["noise"] for entry in half)
        worth = f"better than scaling, up to {best:.2f}" if best > 1.05 else "no better than scaling"
        gains = [entry["gain"] for entry in half if entry["gain"] is not None]
        yield f"{operator} at half energy, G² over N", ".2f", gains, f"G {left:.0%}, N {noise:.0%}: {worth}"
    for entries in zip(*(each["thresholds"] for each in matrices), strict=True):
        above = f"{median(entry['above'] for entry in entries):.1%} of singular values above c"
        name = f"soft clip at c = {entries[0]['strength']:g}, energy left"
        yield name, ".1%", [entry["energy"] for entry in entries], above


def reading_rows(subject: Summary) -> Rows:
    """Median, range over matrices and verdict of every quantity of one subject."""
    rows = [["quantity", "median", "least", "most", "verdict"]]
    for name, form, values, words in quantities(subject):
        if values:
            rows.append([name, *(format(each, form) for each in (median(values), min(values), max(values))), words])
    return rows


def side_by_side_rows(subjects: dict[str, Summary]) -> Rows:
    """The medians of every subject beside each other."""
    medians = [{row[0]: row[1] for row in reading_rows(subject)[1:]} for subject in subjects.values()]
    names = dict.fromkeys(name for column in medians for name in column)
    return [["median", *subjects], *([name, *(column.get(name, "-") for column in medians)] for name in names)]


def spectrum_headline(summary: Summary) -> str:
    """The spike's share of a gradient's energy, and the tails of its noise."""
    for name, subject in summary["subjects"].items():
        rows = {row[0]: row for row in reading_rows(subject)}
        if SPIKE in rows:
            return (
                f"The top 1.5% of the singular directions hold {rows[SPIKE][1]} of a batch's gradient energy in the "
                f"median matrix of {name}; the tails of its noise are {rows[TAIL][-1]}."
            )
    return "Weights alone were measured."


def reading_notes(subject: Summary) -> list[str]:
    """Notes on changes over training and on limits of the numbers."""
    text, notes, stages = subject["text"], [], subject["stages"]
    matrices = with_gradients(subject)
    if matrices and not any(each.get("momentum") for each in matrices):
        notes.append("There is no optimizer state here, so the momentum is not known.")
    if len(stages) > 1:
        ends = [with_gradients(stage) for stage in (stages[0], stages[-1])]
        if all(ends):
            first, last = (f"{median(each['gradient']['spike_share'] for each in end):.0%}" for end in ends)
            steps = f"from {first} at step {stages[0]['step']:,} to {last} at step {stages[-1]['step']:,}"
            notes.append(f"Over training the spike's share of a gradient goes {steps}.")
    elif matrices:
        notes.append("Spectra over training need a run with a monitor; there is only one stage here.")
    if text and text["batches"] < 16:
        notes.append(f"{text['batches']} batches are few: shares of the mean gradient and of directions are hints.")
    if text and text["repeated"]:
        notes.append(f"The text has only {text['windows']:,} sequences: batches repeat, and noise looks too small.")
    if text and (silent := len(subject["matrices"]) - len(matrices)):
        notes.append(f"{silent} matrices had no gradient on any batch, such as experts that no token met.")
    return notes


HOW = "Medians and ranges are over matrices. docs/spectrum.md says what each number means, and how it is debiased."
