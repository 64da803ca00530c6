"""The papers' claims: solvers against known answers, verdicts on planted results, and the command at a tiny size."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from spectrim.cli import main
from spectrim.lab.claims import catalogue, entry_noise, frank_wolfe, paired, regression, spike_noise, studies, training
from spectrim.lab.claims.claim import Interval, by_sign, mean_interval
from spectrim.lab.claims.settings import BUDGETS, ClaimsConfig
from spectrim.lab.claims.studies import Study, planned, planned_runs, studies_of, tuned_factor
from spectrim.lab.errors import LabError
from spectrim.lab.recipes.names import default_hyperparameters, parse_recipe


def test_every_claim_has_a_check_and_every_check_a_claim() -> None:
    assert list(catalogue.all_claims()) == list(catalogue.CHECKS)


def test_checks_name_studies_that_some_budget_has() -> None:
    known = {study.name for budget in BUDGETS.values() for study in studies_of(budget)}
    named = {study for check in catalogue.CHECKS.values() for study in check.needs}
    assert named <= known


def test_only_takes_beginnings_of_names_and_refuses_others() -> None:
    assert [claim.name for claim in catalogue.chosen(["shrink"])] == [
        *("shrink-adamw", "shrink-muon", "shrink-tails", "shrink-small-batch", "shrink-corrupted"),
    ]
    assert all(not catalogue.CHECKS[claim.name].needs for claim in catalogue.chosen(["theory"]))
    with pytest.raises(LabError, match="--only nonsense: no claim begins so"):
        catalogue.chosen(["nonsense"])


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(-2, -1, "holds"), (1, 2, "does not hold"), (-1, 1, "cannot be judged")]
)
def test_a_difference_is_judged_by_where_its_interval_lies(low: float, high: float, verdict: str) -> None:
    assert by_sign(Interval(mean=(low + high) / 2, low=low, high=high)) == verdict


def test_an_interval_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2 degrees)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_the_solver_finds_the_minimum_that_is_known_for_a_diagonal() -> None:
    direction = torch.diag(torch.tensor([3.0, 1.0, -0.2], dtype=torch.float64))
    best = frank_wolfe.minimise_in_ball(direction, radius=1.0, curvature=2.0)
    expected = torch.diag(torch.tensor([-1.0, -0.5, 0.1], dtype=torch.float64))
    torch.testing.assert_close(best, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("check", [frank_wolfe.clipped_sgd_step, frank_wolfe.clipped_sign_step])
def test_a_wrong_step_is_told_from_frank_wolfe(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frank_wolfe, "DRAWS", 1)
    assert check().verdict == "holds"
    step = frank_wolfe.library_step

    def longer(kind, X, G, **options):
        return X + 1.05 * (step(kind, X, G, **options) - X)

    monkeypatch.setattr(frank_wolfe, "library_step", longer)
    assert check().verdict == "does not hold"


def test_weights_leave_the_ball_where_the_clip_is_looser_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = frank_wolfe.largest_norm
    assert norm(frank_wolfe.Momentum, 1.0, {}) <= 1 + 1e-5
    assert norm(frank_wolfe.Momentum, 1.0, {"clip": 1.2 * frank_wolfe.THRESHOLD}) > 1.05


def test_pre_clipping_holds_and_does_not_for_a_threshold_that_lets_the_spike_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spike_noise, "DRAWS", 50)
    assert spike_noise.pre_clipping().verdict == "holds"
    monkeypatch.setattr(spike_noise, "hard_clip", lambda noisy, bound: noisy)
    assert spike_noise.pre_clipping().verdict == "does not hold"


@pytest.mark.parametrize(
    "check", [entry_noise.perturbed_singular_values, entry_noise.localised_noise, entry_noise.risk_of_shrinkage]
)
def test_theory_of_entry_noise_holds(check) -> None:
    assert check().verdict == "holds"


def test_localisation_does_not_hold_for_gaussian_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = entry_noise.noise_like
    monkeypatch.setattr(entry_noise, "noise_like", lambda G, generator, heavy: draw(G, generator, heavy=False))
    assert entry_noise.localised_noise().verdict == "does not hold"


def test_shrinkage_converges_under_cauchy_noise_where_sgd_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "LENGTHS", (100, 316, 1000))
    finding = regression.heavy_tailed_regression()
    assert finding.figures["shrunk"].high < -0.2
    assert finding.figures["plain"].high > finding.figures["shrunk"].high + 0.1


def planted(losses: dict[str, list[float | None]]) -> dict:
    """A comparison's summary with these final losses, a seed each, and curves that fall to them."""
    recipes = {}
    for name, ends in losses.items():
        seeds = {
            str(seed): {
                "final_loss": end,
                "weight_norm": 10.0 * (end or 1),
                "largest_singular_value": 2.0,
                "optimizer_ms": 3.0,
                "val_loss_by_frequency": {"1-10": end, "11-99": None if end is None else 2 * end},
                "dynamics": {"loss_spikes": seed + 1, "spike_steps": 2 * (seed + 1), "diverged": end is None},
                "curve": {"tokens": [100, 200], "val_loss": [end and end + 1, end]},
            }
            for seed, end in enumerate(ends)
        }
        known = [end for end in ends if end is not None]
        recipes[name] = {"seeds": seeds, "final_loss": sum(known) / len(known) if len(known) == len(ends) else None}
        recipes[name]["state_bytes"] = 50 if name == "spectra" else 100
    return {"recipes": recipes, "config": {"model": {"preset": "tiny"}}}


def test_a_lower_loss_holds_a_higher_one_does_not_and_a_mixed_one_is_open() -> None:
    results = {
        "recipes": planted({"adamw": [4.0, 4.1, 4.2], "b": [3.9, 4.0, 4.11], "c": [4.1, 4.2, 4.31], "d": [3, 5, 4.2]})
    }
    verdicts = [training.better(results, recipe, "adamw").verdict for recipe in ("b", "c", "d")]
    assert verdicts == ["holds", "does not hold", "cannot be judged"]


def test_a_claim_of_being_as_good_allows_a_margin() -> None:
    ends = {"adamw": [4.0, 4.1, 4.2], "b": [4.01, 4.11, 4.211], "c": [4.05, 4.15, 4.251]}
    results = {"recipes": planted(ends), "variant": planted({"b": [4.0, 4.1, 4.2]})}
    assert [training.no_worse(results, recipe, "adamw").verdict for recipe in ("b", "c")] == ["holds", "does not hold"]
    variant = training.no_worse_than_variant(results, "b", "variant")
    assert variant.verdict == "holds"
    assert "the variant variant" in variant.measured


def test_a_run_that_diverged_leaves_a_difference_open() -> None:
    results = {"recipes": planted({"adamw": [4.0, 4.1], "b": [3.9, None]})}
    assert training.better(results, "b", "adamw").verdict == "cannot be judged"


def test_tokens_to_the_loss_are_read_from_each_seeds_curve() -> None:
    results = {"recipes": planted({"adamw": [4.0, 4.0], "b": [3.5, 3.5]})}
    # From 4.5 at 100 to 3.5 at 200: 4.0 is reached at 150, three quarters of the tokens.
    assert paired.token_shares(results, "b", "adamw") == [pytest.approx(0.75)] * 2
    finding = training.fewer_tokens(results, "b", "adamw", 0.2)
    assert finding.verdict == "holds"
    assert finding.figures["saved"].mean == pytest.approx(0.25)


def test_safe_rates_compare_what_a_larger_rate_costs() -> None:
    results = {
        "recipes": planted({"adamw": [4.0, 4.1], "b": [3.9, 4.0]}),
        "rate-x4": planted({"adamw": [5.0, 5.11], "b": [4.0, 4.1]}),
        "rate-x16": planted({"adamw": [None, 9.0], "b": [4.2, 4.3]}),
    }
    finding = training.safe_rates(results, "b", "adamw")
    assert finding.verdict == "holds"
    assert finding.figures["gap_x4"].mean == pytest.approx(-0.905)
    assert "at 16 times the rate adamw diverged" in finding.measured
    results["rate-x16"] = planted({"adamw": [4.2, 4.3], "b": [None, 4.3]})
    assert training.safe_rates(results, "b", "adamw").verdict == "cannot be judged"


def test_corrupted_batches_compare_what_they_cost() -> None:
    results = {
        "recipes": planted({"adamw": [4.0, 4.1], "b": [3.9, 4.0]}),
        "corrupted": planted({"adamw": [4.5, 4.61], "b": [4.0, 4.1]}),
    }
    finding = training.limits_damage(results, "b", "adamw")
    assert finding.verdict == "holds"
    assert finding.figures["gap"].mean == pytest.approx(-0.405)
    assert "b: 3 loss spikes of 2.0 steps; adamw: 3 loss spikes of 2.0 steps" in finding.measured
    assert training.limits_damage(results, "adamw", "adamw").verdict == "cannot be judged"


def test_loss_at_equal_time_is_judged_by_its_interval() -> None:
    results = {"recipes": planted({"b": [4.0, 4.1]})}
    found = {"share": 0.5, "difference": {"mean": 0.1, "low": 0.05, "high": 0.15, "pairs": 2}}
    results["recipes"]["recipes"]["b"]["equal_time"] = found
    assert training.at_equal_time(results, "b", "adamw").verdict == "does not hold"
    found["difference"] = {"mean": 0.1, "low": None, "high": None, "pairs": 1}
    assert training.at_equal_time(results, "b", "adamw").verdict == "cannot be judged"


def test_tails_are_judged_at_every_batch_and_vocabulary() -> None:
    def measured(index: float | None, **data: int) -> dict:
        return {"tail_index": index, "config": {"data": {"batch_size": 16, "vocabulary_size": None, **data}}}

    results = {"recipes": measured(1.5), "batch-1": measured(1.1, batch_size=1), "hard": measured(9.0)}
    finding = training.heavy_tails(results)
    assert finding.verdict == "holds"
    assert "1 sequences, vocabulary default: 1.10" in finding.measured
    assert training.heavy_tails(results | {"vocabulary-99": measured(3.0)}).verdict == "cannot be judged"
    assert training.heavy_tails({"recipes": measured(2.5)}).verdict == "does not hold"
    assert training.heavy_tails({"recipes": measured(None)}).verdict == "cannot be judged"


def test_a_study_trains_what_the_claims_need_and_every_recipe_is_tuned() -> None:
    budget = dataclasses.replace(BUDGETS["quick"], factors=(1.0, 2.0))
    needs = {"recipes": {"muon", "spectra"}, "hard": {"adamw+clip"}, "elsewhere": {"signum"}}
    every = ["adamw+clip", "muon", "spectra"]
    plan = {study.name: recipes for study, recipes in planned(needs, budget)}
    assert plan == {"tune-1": every, "tune-2": every, "recipes": ["muon", "spectra"], "hard": ["adamw+clip"]}
    assert planned_runs(needs, budget) == 2 * 3 + 3 * 2 + 3 * 1
    assert planned_runs({}, budget) == 0


def test_half_of_the_state_is_counted() -> None:
    results = {"recipes": planted({"adamw": [4.0], "spectra": [4.0]})}
    assert training.half_the_state(results, "spectra", "adamw").figures["share"] == pytest.approx(0.5)


def test_rates_are_tuned_by_the_lowest_loss_and_a_diverged_trial_is_none() -> None:
    done = {
        "tune-0.5": planted({"adamw": [4.0]}),
        "tune-1": planted({"adamw": [3.9]}),
        "tune-2": planted({"adamw": [None]}),
    }
    assert tuned_factor("adamw", done) == 1.0
    assert tuned_factor("another", done) == 1.0


def test_the_command_trains_judges_and_goes_on_without_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"presets": ("tiny",), "steps": 2, "evaluations": 2, "factors": (1.0,), "seeds": (1, 2)}
    monkeypatch.setitem(BUDGETS, "quick", dataclasses.replace(BUDGETS["quick"], **shape))
    text = tmp_path / "text.txt"
    text.write_text("One sentence of text, and another one. " * 800, encoding="utf-8")
    asked = ["claims", "--budget", "quick", "--only", "clip-adamw", "--only", "bayes", "--data", str(text)]
    asked += ["--vocabulary-size", "300", "--runs-dir", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    assert main(asked) == 0
    folder = tmp_path / "claims" / "quick"
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in written["claims"]] == ["bayes-risk", "clip-adamw"]
    page = (folder / "results.md").read_text(encoding="utf-8")
    assert "spectrim claims --budget quick --only clip-adamw" in page
    assert "| adamw+clip | " in page.partition("## Learning rates that were tried")[2]
    assert (folder / "effects.svg").is_file()
    assert (folder / "report.html").is_file()
    trained = (folder / "recipes" / "adamw" / "seed-1" / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    again = [word for word in asked if word not in ("--only", "clip-adamw", "bayes")]
    assert main([*again, "--only", "clip-adamw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["verdict"] in ("holds", "does not hold", "cannot be judged")
    kept = json.loads((folder / "results.json").read_text(encoding="utf-8"))["claims"]
    assert kept == written["claims"]
    assert (folder / "recipes" / "adamw" / "seed-1" / "result.json").stat().st_mtime_ns == trained


def test_the_quick_budget_is_a_plan_of_which_every_study_has_its_own_name() -> None:
    for budget in BUDGETS.values():
        names = [study.name for study in studies_of(budget)]
        assert len(set(names)) == len(names)


def test_a_studys_rates_are_the_tuned_ones_times_its_factor() -> None:
    budget = dataclasses.replace(BUDGETS["quick"], factors=(1.0, 2.0))
    done = {"tune-1": planted({"adamw": [4.0]}), "tune-2": planted({"adamw": [3.0]})}
    study = Study(name="rate-x4", preset="tiny", seeds=(1,), times=4)
    settings = studies.settings_of(study, ["adamw"], ClaimsConfig(), budget, done)
    default = default_hyperparameters(parse_recipe("adamw")).lr
    assert settings.lr == {"adamw": pytest.approx(8 * default)}
