import pytest

from spectrim.lab.results import Curve, RunResult, mean_curve, summarise, tokens_to_reach


def curve(*losses: float | None) -> Curve:
    """Evaluated every 100 tokens."""
    return Curve(tokens=tuple(100 * index for index in range(1, len(losses) + 1)), val_loss=losses)


def run(recipe: str, seed: int, *losses: float | None) -> RunResult:
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
