import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from report_results import entry as stored_entry
from report_results import results as stored_results
from spectrim.lab.config import SharedConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.comparison import compare
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.logging.log import StepRecord, read_log
from spectrim.lab.logging.monitor_log import MonitorRecord
from spectrim.lab.logging.run_result import RunResult
from spectrim.lab.reports.comparison_report import difference, terminal_tables
from spectrim.lab.reports.markdown import markdown
from spectrim.lab.reports.page.comparison_page import comparison_part
from spectrim.lab.reports.page.sections import Study
from spectrim.lab.training.folder import RunFolder

pytestmark = pytest.mark.usefixtures("empty_pictures")


class Watcher:
    """Remembers what was run, and can stop everything at a step of a run."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.timed: list[str] = []
        self.started: list[str] = []
        self.steps: list[int] = []
        self.records: list[int] = []
        self.finished: list[str] = []
        self.stop = stop

    def calibration_started(self, config: TrainConfig) -> None:
        self.timed.append(config.recipe)

    def run_started(self, config: TrainConfig) -> None:
        self.started.append(f"{config.recipe}-{config.seed}")

    def step(self, record: StepRecord) -> None:
        self.steps.append(record["step"])
        if self.stop == (len(self.started), record["step"]):
            raise KeyboardInterrupt

    def measured(self, record: MonitorRecord) -> None:
        self.records.append(record["step"])

    def run_finished(self, config: TrainConfig, result: RunResult) -> None:
        self.finished.append(f"{config.recipe}-{config.seed}")


@pytest.fixture(scope="module")
def config(small_config: TrainConfig) -> CompareConfig:
    shared = {key: getattr(small_config, key) for key in SharedConfig.model_fields}
    return CompareConfig(recipes=("adamw", "muon"), seeds=(0, 1), **shared)


@pytest.fixture(scope="module")
def compared(config: CompareConfig, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of the whole comparison, with its pictures, which tests look at and leave as it is."""
    folder = tmp_path_factory.mktemp("compared")
    compare(config, folder / "x", cache_dir=cache_dir)
    return folder / "x"


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return summary


def test_an_interrupted_comparison_goes_on_and_repeats_nothing(
    config: CompareConfig, compared: Path, tmp_path: Path, cache_dir: Path
) -> None:
    whole = summary_of(compared)
    # The second run is stopped at its fifth step, one after a checkpoint.
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "parts", cache_dir=cache_dir, monitor=Watcher(stop=(2, 5)))
    watcher = Watcher()
    parts = compare(config, tmp_path / "parts", cache_dir=cache_dir, monitor=watcher)
    assert watcher.started == ["muon-0", "adamw-1", "muon-1"]
    assert watcher.steps[:2] == watcher.records[:2] == [5, 6]
    assert watcher.finished == ["adamw-0", "muon-0", "adamw-1", "muon-1"]
    for recipe in ("adamw", "muon"):
        assert parts["recipes"][recipe]["curve"] == whole["recipes"][recipe]["curve"]

    idle = Watcher()
    assert compare(config, tmp_path / "parts", cache_dir=cache_dir, monitor=idle) == parts
    assert idle.started == []


def test_results_hold_every_promised_key(compared: Path) -> None:
    results = summary_of(compared)
    assert list(results["recipes"]) == ["adamw", "muon"]
    promised = {"final_loss", "tokens_to_adamw", "optimizer_ms", "step_ms", "state_bytes", "weight_norm"}
    promised |= {"largest_singular_value", "forward_backward_ms", "rest_ms", "rest_share", "lr", "curve", "seeds"}
    for entry in results["recipes"].values():
        assert promised <= entry.keys()
        seeds = entry["seeds"]
        assert list(seeds) == ["0", "1"]
        assert entry["final_loss"] == pytest.approx((seeds["0"]["final_loss"] + seeds["1"]["final_loss"]) / 2)
        # A median of sums is at least the median of each part, however busy the machine.
        assert all(entry["step_ms"] >= entry[part] for part in ("forward_backward_ms", "optimizer_ms", "rest_ms"))
    assert results["config"]["seeds"] == [0, 1]
    assert (compared / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (compared / "loss.svg").read_text()
    assert "| `muon` |" in (compared / "summary.md").read_text()


def test_all_recipes_start_from_the_same_weights_and_see_the_same_batches(
    config: CompareConfig, compared: Path
) -> None:
    first = {
        (recipe, seed): read_log(compared / recipe / f"seed-{seed}" / "log.jsonl")[0]
        for recipe in config.recipes
        for seed in config.seeds
    }
    for seed in config.seeds:
        assert first["adamw", seed]["loss"] == first["muon", seed]["loss"]
        assert first["adamw", seed]["grad_norm"] == first["muon", seed]["grad_norm"]
    assert first["adamw", 0]["loss"] != first["adamw", 1]["loss"]


def test_recipes_and_seeds_may_be_added_and_must_be_named_again(
    config: CompareConfig, tmp_path: Path, cache_dir: Path
) -> None:
    small = config.model_copy(update={"seeds": (0,)})
    compare(small, tmp_path / "x", cache_dir=cache_dir)
    grown = config.model_copy(update={"recipes": ("spectra", "adamw", "muon"), "seeds": (0,)})
    watcher = Watcher()
    compare(grown, tmp_path / "x", cache_dir=cache_dir, monitor=watcher)
    assert watcher.started == ["spectra-0"]
    with pytest.raises(LabError, match="has recipes spectra too"):
        compare(small, tmp_path / "x", cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"steps": 7}, "steps is 6 there, 7 here; choose another --name"),
        ({"lr": {"muon": 0.5}}, r"optimizer\.lr is .* there, 0\.5 here; choose another --name"),
    ],
)
def test_other_settings_under_the_same_name_are_refused_naming_the_difference(
    config: CompareConfig, tmp_path: Path, cache_dir: Path, update: dict[str, object], message: str
) -> None:
    out = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt):
        compare(config, out, cache_dir=cache_dir, monitor=Watcher(stop=(2, 1)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(LabError, match=message):
        compare(config.model_copy(update=update), out, cache_dir=cache_dir)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_changed_text_is_refused(config: CompareConfig, text_folder: Path, tmp_path: Path, cache_dir: Path) -> None:
    copy = tmp_path / "text"
    shutil.copytree(text_folder, copy)
    data = config.data.model_copy(update={"sources": (str(copy),)})
    mine = config.model_copy(update={"data": data, "recipes": ("adamw",), "seeds": (0,)})
    compare(mine, tmp_path / "x", cache_dir=cache_dir)
    (copy / "new.txt").write_text("a new document " * 50)
    with pytest.raises(LabError, match="trained on other text"):
        compare(mine, tmp_path / "x", cache_dir=cache_dir)


def test_a_folder_that_is_no_comparison_is_left_alone(config: CompareConfig, tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LabError, match="is no comparison"):
        compare(config, tmp_path, cache_dir=cache_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_diverged_recipe_is_reported_as_such(tmp_path: Path) -> None:
    summary = stored_results(
        {"adamw": stored_entry([5.0, 4.0], tokens_to_adamw=1.0), "muon": stored_entry([5.0, None])}
    )
    page = markdown(comparison_part(Study(kind="compare", folder=tmp_path, summary=summary)), {})
    assert "| diverged | never |" in page
    [verdict] = [line for line in page.splitlines() if line.endswith("| diverged |")]
    assert verdict.startswith("| `muon` |")
    assert [len(table.rows) for table in terminal_tables(summary)] == [2]


def test_one_recipe_may_have_a_hyperparameter_of_its_own(
    config: CompareConfig, tmp_path: Path, cache_dir: Path
) -> None:
    mine = {"muon": {"momentum": 0.8, "weight_decay": 0.0, "lr": 0.5}}
    small = config.model_copy(update={"seeds": (0,), "overrides": mine, "lr": {"muon": 0.01}})
    compare(small, tmp_path / "x", cache_dir=cache_dir)
    stored = {name: RunFolder(tmp_path / "x" / name / "seed-0").stored_config() for name in ("adamw", "muon")}
    settings = {name: run.optimizer for name, run in stored.items() if run}
    assert (settings["muon"].momentum, settings["muon"].weight_decay) == (0.8, 0.0)
    assert settings["muon"].lr == 0.01, "the flag of its own wins"
    assert (settings["adamw"].momentum, settings["adamw"].weight_decay) == (None, 0.1)
    other = {"muon": {**mine["muon"], "momentum": 0.9}}
    with pytest.raises(LabError, match=r"optimizer\.momentum is 0\.8 there, 0\.9 here"):
        compare(small.model_copy(update={"overrides": other}), tmp_path / "x", cache_dir=cache_dir)


def test_the_page_says_both_terms_and_shows_both_pictures(compared: Path) -> None:
    summary = summary_of(compared)
    page = (compared / "summary.md").read_text()
    assert "**On equal terms**" in page
    assert page.count("| `muon` |") == 4
    assert "<svg" in (compared / "loss_over_time.svg").read_text()
    ranks = list(summary["recipes"]["adamw"]["val_loss_by_frequency"])
    assert f"| recipe | {' | '.join(f'ranks {key}' for key in ranks)} |" in page
    assert [len(table.rows) for table in terminal_tables(summary)] == [2, 2]
    assert difference({"mean": -0.1, "low": -0.3, "high": 0.1, "pairs": 3}) == "-0.1000 ±0.2000"
    assert difference({"mean": 0.1, "low": None, "high": None, "pairs": 1}) == "+0.1000"
