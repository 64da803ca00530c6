from typing import Any

import pytest

from report_results import entry, paired, results
from spectrim.lab.experiments.results import summarise
from spectrim.lab.logging.run_result import Curve, RunResult
from spectrim.lab.reports.comparison_report import verdict_rows
from spectrim.lab.reports.words import (
    comparison_headline,
    reading_notes,
    reading_rows,
    side_by_side_rows,
    spectrum_headline,
    sweep_headline,
)

ENDS = "muon ends at 3.9000, AdamW at 4.0000"
INTERVAL = "95\u00a0% interval"
REACHED = "AdamW's loss after 80% of the tokens"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            entry([5.0, 3.9], tokens_to_adamw=0.8, difference_to_adamw=paired(-0.1, -0.12, -0.08)),
            f"{ENDS}: lower; -0.1000; {INTERVAL} -0.1200 to -0.0800, 3 seeds; {REACHED}.",
        ),
        (
            entry([5.0, 3.9], tokens_to_adamw=0.8, difference_to_adamw=paired(-0.1, -0.3, 0.1)),
            f"{ENDS}: lower, not significant; -0.1000; {INTERVAL} -0.3000 to +0.1000, 3 seeds; {REACHED}.",
        ),
        (
            entry([5.0, 3.9], tokens_to_adamw=0.8, difference_to_adamw=paired(-0.1, None, None)),
            f"{ENDS}: lower, one seed; -0.1000; {REACHED}.",
        ),
        (
            entry([5.0, 4.2], difference_to_adamw=paired(0.2, 0.1, 0.3)),
            f"muon ends at 4.2000, AdamW at 4.0000: higher; +0.2000; {INTERVAL} +0.1000 to +0.3000, 3 seeds.",
        ),
        (entry([5.0, None]), "AdamW ends at 4.0000; no other recipe ended."),
    ],
)
def test_the_headline_is_as_sure_as_the_interval(other: dict[str, Any], expected: str) -> None:
    assert comparison_headline(results({"adamw": entry([5.0, 4.0]), "muon": other})) == expected


def test_the_headline_prefers_a_sure_gain_to_a_larger_one() -> None:
    recipes = {
        "adamw": entry([5.0, 4.0]),
        "muon": entry([5.0, 3.8], tokens_to_adamw=0.7, difference_to_adamw=paired(-0.2, -0.5, 0.1)),
        "adamw+clip": entry([5.0, 3.9], tokens_to_adamw=0.9, difference_to_adamw=paired(-0.1, -0.2, -0.05)),
    }
    assert comparison_headline(results(recipes)).startswith("adamw+clip ends at 3.9000")


def test_headlines_without_something_to_hold_against() -> None:
    assert comparison_headline(results({"adamw": entry([5.0, None])})) == "Every recipe diverged."
    without = comparison_headline(results({"muon": entry([5.0, 4.0])}))
    diverged = comparison_headline(results({"adamw": entry([5.0, None]), "muon": entry([5.0, 4.0])}))
    assert without == diverged == "muon ends lowest, at 4.0000; AdamW has no final loss to compare it with."
    assert sweep_headline({"recipes": {"adamw": {"best": None}}}) == "No trial has reached its end yet."


def run(recipe: str, seed: int, loss: float | None) -> RunResult:
    times = dict.fromkeys(("step_ms", "forward_backward_ms", "optimizer_ms", "rest_ms", "rest_share"), 2.0)
    return RunResult(
        recipe=recipe, seed=seed, lr=0.1, embedding_lr=1, head_lr=1, final_loss=loss, state_bytes=3, weight_norm=1.0,
        largest_singular_value=1.0, parameters=1, data_key="x", environment={},
        curve=Curve(tokens=(1, 2), val_loss=(5.0, loss)), **times,
    )  # fmt: skip


def test_the_verdict_follows_the_seeds() -> None:
    losses = {"adamw": (4.0, 4.1), "muon": (3.0, 3.101), "spectra": (3.9, 4.3), "signum": (4.0, None)}
    runs = {name: [run(name, seed, loss) for seed, loss in enumerate(both)] for name, both in losses.items()}
    header, *rows = verdict_rows({"recipes": summarise(runs)})
    muon, spectra, signum = (dict(zip(header, row, strict=True)) for row in rows)
    assert (muon["verdict"], muon["95 % interval"]) == ("lower", "-1.0059 to -0.9931")
    assert (muon["step time"], muon["optimizer state"]) == ("x1.00", "x1.00")
    assert spectra["verdict"] == "higher, not significant"
    assert (signum["verdict"], signum["final loss"]) == ("diverged", "-")
    alone = verdict_rows({"recipes": summarise({"adamw": runs["adamw"][:1], "muon": runs["muon"][:1]})})
    assert (alone[1][3], alone[1][-1]) == ("-", "lower, one seed")
    assert verdict_rows({"recipes": summarise({"muon": runs["muon"]})}) == []


def share(value: float) -> dict[str, Any]:
    return {"share": {"value": value}, "expected": 0.1}


def matrix(spike: float, *, localisation: float = 0.1, gain: float = 1.0) -> dict[str, Any]:
    """What ``spectrum.json`` holds of a matrix."""
    noise = {"energy": 4.0, "localisation": {"value": localisation}}
    noise |= {side: share(0.3) for side in ("left", "right")}
    noise |= {side: share(0.1) for side in ("recurring_left", "recurring_right")}
    fits = [{"model": "student", "log_likelihood": -1.0}, {"model": "gaussian", "log_likelihood": -1.5}]
    operator = {"operator": "soft clip", "energy": 0.5, "signal": {"value": 0.8}, "noise": 0.4, "gain": gain}
    return {
        "gradient": {"spike_share": spike},
        "mean_gradient": {"spike_share": 0.5, "energy": {"value": 1.0, "error": 0.1}, "above_floor": 3},
        "momentum": None,
        "second_moment": {"share": 0.4, "median_share": 0.2, "contraction": 0.7},
        "noise": noise,
        "directions": [{"relative": 1.0}, {"relative": 3.0}, {"relative": None}],
        "tails": {"fits": fits, "kurtosis": {"pooled": 2.0, "within": 0.1}},
        "operators": [operator, operator | {"energy": 0.9, "gain": 1.2}],
        "thresholds": [{"strength": 0.05, "energy": 0.6, "above": 0.02}],
        "weight": {"spectral_norm": 3.0, "stable_rank": 9.0},
    }


def subject(*matrices: dict[str, Any], batches: int = 32) -> dict[str, Any]:
    text = {"batches": batches, "repeated": False, "windows": 10}
    return {"matrices": dict(enumerate(matrices)), "stages": [{}], "text": text}


def test_a_reading_has_median_range_and_verdict_of_every_quantity() -> None:
    rows = {row[0]: row[1:] for row in reading_rows(subject(matrix(0.2), matrix(0.4), matrix(0.3)))}
    assert rows["spike's share of a gradient's energy"] == ["30%", "20%", "40%", ""]
    assert "spike's share of the momentum" not in rows
    assert rows["variance over mean², last known direction"][0] == "3"
    assert rows["overlap of N and G, times chance"] == ["3.0", "3.0", "3.0", "directions shared"]
    assert rows["overlap of N between batches, times chance"][-1] == "fresh on every batch"
    assert rows["excess kurtosis of an entry over batches"][-1] == "unlike variances"
    assert rows["soft clip at half energy, G² over N"][-1] == "G 80%, N 40%: better than scaling, up to 1.20"
    assert rows["soft clip at c = 0.05, energy left"] == ["60.0%"] * 3 + ["2.0% of singular values above c"]
    assert rows["stable rank of weights"][0] == "9"


def test_subjects_stand_side_by_side_and_missing_numbers_are_dashes() -> None:
    weights_alone = subject({"weight": {"spectral_norm": 2.0, "stable_rank": 5.0}}) | {"text": None, "stages": []}
    rows = side_by_side_rows({"trained": subject(matrix(0.2)), "untrained": weights_alone})
    assert rows[0] == ["median", "trained", "untrained"]
    assert rows[1][1:] == ["20%", "-"]
    assert rows[-1] == ["stable rank of weights", "9", "5"] or ["stable rank of weights", "9", "5"] in rows
    assert spectrum_headline({"subjects": {"untrained": weights_alone}}) == "Weights alone were measured."
    headline = spectrum_headline({"subjects": {"a": weights_alone, "b": subject(matrix(0.2))}})
    assert (
        headline
        == "In b's median matrix the spike holds 20% of a batch's gradient energy; noise: heavier than Gaussian."
    )


def test_notes_tell_what_limits_the_numbers() -> None:
    silent = {"weight": {"spectral_norm": 2.0, "stable_rank": 5.0}}
    notes = " ".join(reading_notes(subject(matrix(0.2), silent, batches=4)))
    for words in ("no optimizer state", "4 batches are few", "1 matrices had no gradient", "only one stage"):
        assert words in notes
    stages = [{"step": step, "matrices": {"q": {"gradient": {"spike_share": step / 100}}}} for step in (10, 40)]
    assert "from 10% at step 10 to 40% at step 40" in " ".join(reading_notes(subject(matrix(0.2)) | {"stages": stages}))
