import json
from pathlib import Path

import pytest

from spectrim.lab.config import SharedConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments import equal_time
from spectrim.lab.experiments.comparison import compare
from spectrim.lab.experiments.equal_time import CALIBRATION_STEPS, fit_steps, time_step
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.logging.log import read_log
from spectrim.lab.recipes.names import resolve

pytestmark = pytest.mark.usefixtures("empty_pictures")

SPEEDS = {"adamw": 0.1, "muon": 0.25, "spectra": 0.3}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recipes are given a speed instead of being timed; remembers which."""
    asked: list[str] = []

    def time(run: TrainConfig, out: Path, cache_dir: Path | None, *, compiled: bool) -> float:
        asked.append(run.recipe)
        return SPEEDS[run.recipe]

    monkeypatch.setattr(equal_time, "time_step", time)
    return asked


def runs(small_config: TrainConfig, *recipes: str) -> list[TrainConfig]:
    return [resolve(small_config.model_copy(update={"recipe": recipe})) for recipe in recipes]


def test_every_recipe_gets_the_steps_that_fit_and_keeps_them(
    small_config: TrainConfig, tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_steps(runs(small_config, "muon", "adamw"), tmp_path, seconds=None)
    assert first.seconds == pytest.approx(0.6)
    assert first.steps == {"muon": 2, "adamw": 6}
    # A recipe that is added is timed; the others keep their steps, however fast the machine is today.
    monkeypatch.setitem(SPEEDS, "adamw", 5.0)
    again = fit_steps(runs(small_config, "muon", "adamw", "spectra"), tmp_path, seconds=None)
    assert again.steps == {"muon": 2, "adamw": 6, "spectra": 2}
    assert timed == ["muon", "adamw", "spectra"]


def test_a_time_that_is_too_short_names_the_recipe(small_config: TrainConfig, tmp_path: Path, timed: list[str]) -> None:
    with pytest.raises(LabError, match=r"one step of 'spectra' takes 0\.3 s"):
        fit_steps(runs(small_config, "spectra"), tmp_path, seconds=0.2)
    with pytest.raises(LabError, match="give the time with --seconds"):
        fit_steps(runs(small_config, "muon"), tmp_path, seconds=None)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_timed_by_the_steps_of_a_short_run(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    seconds = time_step(resolve(small_config), tmp_path / "c", cache_dir)
    records = read_log(tmp_path / "c" / "log.jsonl")
    assert len(records) == CALIBRATION_STEPS
    keys = ("forward_backward_ms", "gradient_clip_ms", "optimizer_ms", "logging_ms", "rest_ms")
    assert seconds == pytest.approx(sum(record.get(key, 0) for record in records[3:] for key in keys) / 30_000)


@pytest.mark.usefixtures("timed")
def test_a_comparison_at_equal_time_ends_every_schedule(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    shared = {key: getattr(small_config, key) for key in SharedConfig.model_fields}
    config = CompareConfig(recipes=("adamw", "spectra"), equal="time", **shared)
    compare(config, tmp_path / "x", cache_dir=cache_dir)
    for recipe, steps in (("adamw", 6), ("spectra", 2)):
        records = read_log(tmp_path / "x" / recipe / "seed-0" / "log.jsonl")
        assert len(records) == steps
        # A tenth of the peak: the cosine has come down.
        assert records[-1]["lr"] == pytest.approx(0.1 * max(record["lr"] for record in records), rel=1e-6) or steps == 2
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    assert results["budget"]["steps"] == {"adamw": 6, "spectra": 2}
    assert "0.6 s of training" in (tmp_path / "x" / "summary.md").read_text()
    with pytest.raises(LabError, match="equal is 'time' there, 'tokens' here"):
        compare(config.model_copy(update={"equal": "tokens"}), tmp_path / "x", cache_dir=cache_dir)
    with pytest.raises(LabError, match="only a comparison at equal time has a time"):
        compare(config.model_copy(update={"equal": "tokens", "seconds": 1.0}), tmp_path / "y", cache_dir=cache_dir)
