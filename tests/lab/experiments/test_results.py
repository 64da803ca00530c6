import pytest

from spectrim.lab.experiments.results import mean_by_frequency, mean_curve, summarise, tokens_to_reach
from spectrim.lab.logging.dynamics import Dynamics
from spectrim.lab.logging.run_result import Curve, RunResult


def curve(*losses: float | None) -> Curve:
    """Evaluated every 100 tokens."""
    return Curve(tokens=tuple(100 * index for index in range(1, len(losses) + 1)), val_loss=losses)


def run(recipe: str, seed: int, *losses: float | None, seconds: float | None = None) -> RunResult:
    """With ``seconds``, each evaluation came after so many more."""
    times = tuple(seconds * index for index in range(1, len(losses) + 1)) if seconds else ()
    dynamics = Dynamics(seconds=times, unevenness=1.1, diverged=losses[-1] is None, loss_spikes=2) if seconds else None
    return RunResult(
        recipe=recipe,
        seed=seed,
        lr=0.01,
        embedding_lr=1.0,
        head_lr=1.0,
        final_loss=losses[-1],
        step_ms=4.0 + seed,
        forward_backward_ms=2.0,
        optimizer_ms=1.0,
        rest_ms=0.1,
        rest_share=0.03,
        state_bytes=8,
        weight_norm=3.0,
        largest_singular_value=2.0,
        parameters=10,
        curve=curve(*losses),
        data_key="key",
        environment={"torch": "2"},
        dynamics=dynamics,
    )


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((5.0, 4.0, 3.0), 3.5, 250.0),  # half way between the second and the third evaluation
        ((5.0, 4.0, 3.0), 4.0, 200.0),  # exactly at an evaluation
        ((5.0, 4.0, 3.0), 6.0, 100.0),  # before the first one: nothing to interpolate with
        ((5.0, 4.0, 3.0), 2.9, None),
        ((5.0, 3.0, 4.0, 2.0), 3.5, 175.0),  # the first time counts, though it rises again
        ((5.0, None, 3.0), 3.5, 300.0),  # no line through a hole
        ((None, None), 3.5, None),
    ],
)
def test_tokens_to_reach_by_hand(losses: tuple[float | None, ...], target: float, expected: float | None) -> None:
    reached = tokens_to_reach(curve(*losses), target)
    assert reached == (None if expected is None else pytest.approx(expected))


def test_the_mean_curve_is_reached_not_the_mean_of_the_times() -> None:
    # Means 5, 4, 3 against AdamW's 5, 4.5, 4: the target 4 is reached at 200 of 300 tokens. One seed of the recipe
    # does not reach it before the end, so that a mean over seeds of the tokens would say something else.
    runs = {
        "adamw": [run("adamw", 0, 5.0, 4.4, 3.9), run("adamw", 1, 5.0, 4.6, 4.1)],
        "muon": [run("muon", 0, 4.5, 3.0, 2.0), run("muon", 1, 5.5, 5.0, 4.0)],
    }
    summary = summarise(runs)
    assert summary["muon"]["tokens_to_adamw"] == pytest.approx(200 / 300)
    assert summary["adamw"]["tokens_to_adamw"] == pytest.approx(1.0)
    assert summary["muon"]["final_loss"] == pytest.approx(3.0)
    assert summary["muon"]["step_ms"] == pytest.approx(4.5)
    assert summary["muon"]["seeds"]["1"]["final_loss"] == 4.0
    assert summary["muon"]["curve"]["val_loss"] == [5.0, 4.0, 3.0]


def test_a_recipe_that_never_gets_there_or_diverges_has_none() -> None:
    summary = summarise(
        {
            "adamw": [run("adamw", 0, 5.0, 4.0)],
            "muon": [run("muon", 0, 5.0, 4.5)],
            "spectra": [run("spectra", 0, 5.0, None)],
        }
    )
    assert summary["muon"]["tokens_to_adamw"] is None
    assert summary["spectra"]["tokens_to_adamw"] is None
    assert summary["spectra"]["final_loss"] is None


def test_without_adamw_there_is_nothing_to_compare_with() -> None:
    assert summarise({"muon": [run("muon", 0, 5.0)]})["muon"]["tokens_to_adamw"] is None


def test_a_mean_needs_every_seed() -> None:
    assert mean_curve([curve(5.0, None), curve(4.0, 3.0)]).val_loss == (4.5, None)


def test_at_equal_time_a_slower_recipe_is_where_its_curve_is_by_then() -> None:
    # AdamW takes 30 s with seed 0 and 27 s with seed 1. Muon takes 20 s a third: after 30 s it is half way between its
    # first and its second evaluation, after 27 s at 0.35 of it.
    runs = {
        "adamw": [run("adamw", 0, 5.0, 4.4, 4.0, seconds=10), run("adamw", 1, 5.0, 4.6, 4.1, seconds=9)],
        "muon": [run("muon", 0, 5.0, 4.0, 3.0, seconds=20), run("muon", 1, 5.2, 4.2, 3.2, seconds=20)],
        "signum": [run("signum", 0, 5.0, 4.0, 3.5, seconds=1), run("signum", 1, 5.0, 4.0, 3.7, seconds=1)],
    }
    summary = summarise(runs)
    then = summary["muon"]["equal_time"]
    assert then["seconds"] == pytest.approx(28.5)
    assert then["loss"] == pytest.approx((4.5 + 4.85) / 2)
    assert then["share"] == pytest.approx((1.5 + 1.35) / 2 / 3)
    assert then["difference"]["mean"] == pytest.approx((0.5 + 0.75) / 2)
    # A faster one is done by then, with its final loss; AdamW differs from itself by nothing.
    assert summary["signum"]["equal_time"]["share"] == 1.0
    assert summary["signum"]["equal_time"]["loss"] == pytest.approx(3.6)
    assert summary["adamw"]["equal_time"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "pairs": 2}
    # At equal tokens: differences -1.0 and -0.9.
    difference = summary["muon"]["difference_to_adamw"]
    assert difference["mean"] == pytest.approx(-0.95)
    assert difference["high"] == pytest.approx(-0.95 + 12.7062 * 0.05, rel=1e-4)
    assert summary["muon"]["loss_spikes"] == 4
    assert summary["muon"]["curve_seconds"] == [20, 40, 60]


def test_before_the_first_evaluation_there_is_no_loss_and_a_diverged_run_leaves_no_difference() -> None:
    runs = {
        "adamw": [run("adamw", 0, 5.0, 4.0, seconds=1)],
        "muon": [run("muon", 0, 5.0, 4.0, seconds=10)],
        "spectra": [run("spectra", 0, 5.0, None, seconds=1)],
    }
    summary = summarise(runs)
    assert summary["muon"]["equal_time"]["loss"] is None
    assert summary["muon"]["equal_time"]["share"] == pytest.approx(0.1)
    assert summary["spectra"]["difference_to_adamw"] is None
    assert summary["spectra"]["diverged"] == 1


def test_results_without_times_have_no_equal_time() -> None:
    summary = summarise({"adamw": [run("adamw", 0, 5.0, 4.0)], "muon": [run("muon", 0, 5.0, 4.5)]})
    assert summary["muon"]["equal_time"] is None
    assert summary["muon"]["difference_to_adamw"]["mean"] == 0.5


def test_losses_by_frequency_are_means_over_seeds_and_need_every_one() -> None:
    one, two = {"1-3": 1.0, "4-9": 2.0, "10-20": None}, {"1-3": 2.0, "4-9": None, "10-20": None}
    assert mean_by_frequency([one, two]) == {"1-3": 1.5, "4-9": None, "10-20": None}
    assert mean_by_frequency([one, None]) is None
