import json
import shutil
from pathlib import Path

import pytest

from spectrim.cli import main
from spectrim.lab.config import SharedConfig, TrainConfig
from spectrim.lab.errors import Interrupted, LabError
from spectrim.lab.experiments.settings import SweepConfig
from spectrim.lab.experiments.sweep import Sweep, open_sweep
from spectrim.lab.experiments.sweep_results import good_rates, rate_curve, settings_of_winners, write_sweep_report
from spectrim.lab.logging.log import read_log
from spectrim.lab.training.folder import RunFolder

pytestmark = pytest.mark.usefixtures("empty_pictures")


@pytest.fixture
def config(small_config: TrainConfig) -> SweepConfig:
    shared = {key: getattr(small_config, key) for key in SharedConfig.model_fields}
    return SweepConfig(recipes=("adamw", "muon"), trials=3, pruner="none", **shared)


def finished(sweep: Sweep, recipe: str) -> list[Path]:
    return [path for path in sorted(sweep.folder(recipe, 0).path.parent.iterdir()) if RunFolder(path).result()]


def test_every_recipe_gets_its_budget_once_and_its_default_first(
    config: SweepConfig, tmp_path: Path, cache_dir: Path
) -> None:
    sweep = open_sweep(config, tmp_path / "s", cache_dir=cache_dir)
    lines: list[str] = []
    assert sweep.work(cache_dir=cache_dir, say=lines.append) == 6
    # By turns, so that an interrupted sweep has spent as much on each.
    assert [line.split()[0] for line in lines] == ["adamw", "muon"] * 3
    summary = write_sweep_report(sweep)
    for recipe in config.recipes:
        entry = summary["recipes"][recipe]
        assert (entry["complete"], entry["budget"], len(entry["trials"])) == (3, 3, 3)
        losses = [RunFolder(path).result().final_loss for path in finished(sweep, recipe)]  # type: ignore[union-attr]
        assert [trial["final_loss"] for trial in entry["trials"]] == losses
        assert entry["best"]["final_loss"] == min(losses)
        assert entry["tokens"] == 3 * 6 * 32
    assert summary["recipes"]["adamw"]["trials"][0]["lr"] == 0.003
    assert len({trial["lr"] for trial in summary["recipes"]["adamw"]["trials"]}) == 3
    assert "| `muon` | 3 of 3 |" in (tmp_path / "s" / "summary.md").read_text()
    assert (tmp_path / "s" / "learning_rates.svg").is_file()

    # Called again nothing is left; with more trials, exactly those.
    assert open_sweep(config, tmp_path / "s", cache_dir=cache_dir).work(cache_dir=cache_dir) == 0
    more = config.model_copy(update={"trials": 4})
    assert open_sweep(more, tmp_path / "s", cache_dir=cache_dir).work(only="muon", cache_dir=cache_dir) == 1
    with pytest.raises(LabError, match="3 are fewer"):
        open_sweep(config, tmp_path / "s", cache_dir=cache_dir)
    with pytest.raises(LabError, match="steps is 6 there, 7 here"):
        open_sweep(more.model_copy(update={"steps": 7}), tmp_path / "s", cache_dir=cache_dir)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), Interrupted(15, ""), OSError(28, "No space left on device")])
def test_a_trial_whose_worker_died_is_gone_on_with_and_one_that_lives_is_left(
    config: SweepConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    sweep = open_sweep(config.model_copy(update={"recipes": ("adamw",), "trials": 2}), tmp_path, cache_dir=cache_dir)

    def killed(*_: object, **__: object) -> None:
        raise end

    # Killed at its fourth step's log: the checkpoint after the second is there.
    steps = iter(range(100))
    original = TrainConfig.tokens_per_step.fget
    fourth = property(lambda self: killed() if next(steps) == 3 else original(self))  # type: ignore[misc]
    with monkeypatch.context() as patched:
        patched.setattr(TrainConfig, "tokens_per_step", fourth)
        with pytest.raises(type(end)):
            sweep.work(cache_dir=cache_dir)
    assert sweep.remaining("adamw") == 2
    assert finished(sweep, "adamw") == []

    other = sweep.claim()
    assert other is not None
    assert other.trial.number == 0, "the dead worker's trial comes first"
    # It is held now, so that the next worker gets the other one; and then there is none.
    second = Sweep(tmp_path).claim()
    assert second is not None
    assert second.trial.number == 1
    assert Sweep(tmp_path).claim() is None
    point = dict(other.trial.params)
    second.lock.release()
    other.lock.release()

    assert Sweep(tmp_path).work(cache_dir=cache_dir) == 2
    stored = RunFolder(sweep.folder("adamw", 0).path)
    assert [record["step"] for record in read_log(stored.log_file)] == [1, 2, 3, 4, 5, 6]
    assert stored.result().lr == point["lr"]  # type: ignore[union-attr]
    assert len(finished(sweep, "adamw")) == 2


def test_a_grid_runs_all_of_its_points(config: SweepConfig, tmp_path: Path, cache_dir: Path) -> None:
    space = {"*": {"lr": "0.001,0.01"}, "muon": {"orthogonalize_steps": "3,5"}, "adamw": {"weight_decay": "0.0,0.1"}}
    grid = config.model_copy(update={"method": "grid", "space": space, "steps": 2})
    sweep = open_sweep(grid, tmp_path, cache_dir=cache_dir)
    assert sweep.budget("muon") == sweep.budget("adamw") == 4
    assert sweep.work(cache_dir=cache_dir) == 8
    entry = write_sweep_report(sweep)["recipes"]["muon"]
    points = {(trial["point"]["lr"], trial["point"]["orthogonalize_steps"]) for trial in entry["trials"]}
    assert points == {(0.001, 3), (0.001, 5), (0.01, 3), (0.01, 5)}
    lowest = {lr: min(t["final_loss"] for t in entry["trials"] if t["lr"] == lr) for lr in (0.001, 0.01)}
    assert dict(zip(entry["curve"]["lr"], entry["curve"]["final_loss"], strict=True)) == lowest


def test_a_trial_that_falls_behind_is_pruned_after_half_of_it_and_kept(
    config: SweepConfig, tmp_path: Path, cache_dir: Path
) -> None:
    update = {"recipes": ("adamw",), "trials": 8, "pruner": "median", "steps": 8, "space": {"*": {"lr": "1e-9:1e-2"}}}
    evaluation = config.evaluation.model_copy(update={"times": 8})
    sweep = open_sweep(config.model_copy(update={**update, "evaluation": evaluation}), tmp_path, cache_dir=cache_dir)
    assert sweep.work(cache_dir=cache_dir) == 8
    entry = write_sweep_report(sweep)["recipes"]["adamw"]
    pruned = [trial for trial in entry["trials"] if trial["state"] == "pruned"]
    assert 1 <= len(pruned) == entry["pruned"] <= 5
    for trial in pruned:
        assert 4 <= trial["steps"] < 8
        assert len(read_log(tmp_path / trial["folder"] / "log.jsonl")) == trial["steps"]
        assert trial["last_loss"] > entry["best"]["final_loss"]
    assert sweep.remaining("adamw") == 0


def test_what_is_fixed_is_not_searched(config: SweepConfig, tmp_path: Path, cache_dir: Path) -> None:
    optimizer = config.optimizer.model_copy(update={"head_lr": 2.0})
    fixed = config.model_copy(update={"optimizer": optimizer, "overrides": {"muon": {"momentum": 0.9}}})
    sweep = open_sweep(fixed, tmp_path / "s", cache_dir=cache_dir)
    assert sweep.config.space.keys() == {"adamw", "muon"}
    assert {key for table in sweep.config.space.values() for key in table} == {"lr"}
    everything = fixed.model_copy(update={"overrides": {"muon": {"momentum": 0.9, "lr": 0.1}}})
    with pytest.raises(LabError, match="'muon' has nothing left to search"):
        open_sweep(everything, tmp_path / "t", cache_dir=cache_dir)


def test_a_diverged_trial_is_counted_and_cannot_win(config: SweepConfig, tmp_path: Path, cache_dir: Path) -> None:
    space = {"adamw": {"lr": "0.001,100.0", "weight_decay": "0.1"}}
    grid = config.model_copy(update={"method": "grid", "recipes": ("adamw",), "space": space})
    sweep = open_sweep(grid, tmp_path, cache_dir=cache_dir)
    assert sweep.work(cache_dir=cache_dir) == 2
    entry = write_sweep_report(sweep)["recipes"]["adamw"]
    assert (entry["diverged"], entry["complete"], entry["best"]["lr"]) == (1, 1, 0.001)


def test_commands_do_a_trial_each_and_compare_takes_the_winners(
    text_folder: Path, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--data", str(text_folder), "--preset", "tiny", "--steps", "2", "--batch-size", "2"]
    small += ["--sequence-length", "16", "--vocabulary-size", "300"]
    place = ["--runs-dir", str(tmp_path), "--name", "s", "--cache-dir", str(cache_dir)]
    options = ["--trials", "1", "--space", "torch.optim:NAdam.arguments.eps=1e-6:1e-4"]
    assert main(["sweep", "adamw", "torch.optim:NAdam", *options, *small, *place, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--trial ")[1].split()[0] for line in lines] == ["adamw", "torch.optim:NAdam"]
    assert not (tmp_path / "s" / "trials").exists()

    compare = ["compare", "--from-sweep", str(tmp_path / "s"), "--name", "c"]
    compare += ["--runs-dir", str(tmp_path), "--cache-dir", str(cache_dir)]
    assert main(compare) == 2
    assert "1 trials of 'adamw' are not done" in capsys.readouterr().err
    for line in lines:
        assert main(line.split()[1:]) == 0
    assert main(["sweep", *place, "--commands"]) == 0
    assert capsys.readouterr().out == ""

    winners = settings_of_winners(tmp_path / "s")["overrides"]
    assert main([*compare, "--seeds", "1", "--override", "adamw.weight_decay=0.05"]) == 0
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert list(results["recipes"]) == ["adamw", "torch.optim:NAdam"]
    outside = RunFolder(tmp_path / "c" / "torch.optim.NAdam" / "seed-1").stored_config()
    assert outside is not None
    assert outside.optimizer.arguments == winners["torch.optim:NAdam"]["arguments"]
    assert outside.optimizer.lr == winners["torch.optim:NAdam"]["lr"] == results["recipes"]["torch.optim:NAdam"]["lr"]
    assert results["config"]["overrides"]["adamw"] == {**winners["adamw"], "weight_decay": 0.05}
    assert results["config"]["steps"] == 2


BAD = {
    "no recipe": (["sweep"], "RECIPE is missing"),
    "space": (["sweep", "adamw", "--space", "lr=2:1"], "space lr='2:1'"),
    "space of another recipe": (["sweep", "adamw", "--space", "muon.momentum=0.5,0.9"], "not in this sweep"),
    "not a hyperparameter": (["sweep", "adamw", "--space", "momentum=0.5,0.9"], "does not have that hyperparameter"),
    "no such key": (["sweep", "adamw", "--space", "momentun=0.5,0.9"], "unknown key 'momentun'"),
    "no sweep": (["sweep", "--name", "none", "--trial", "adamw"], "holds no sweep"),
    "winners of nothing": (["compare", "--from-sweep", "none"], "holds no sweep"),
    "pruner": (["sweep", "adamw", "--pruner", "best"], "pruner='best'"),
    "override": (["sweep", "adamw", "--override", "lr=1"], "expected RECIPE.KEY=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_changed_text_is_refused(config: SweepConfig, text_folder: Path, tmp_path: Path, cache_dir: Path) -> None:
    copy = tmp_path / "text"
    shutil.copytree(text_folder, copy)
    data = config.data.model_copy(update={"sources": (str(copy),)})
    mine = config.model_copy(update={"data": data, "recipes": ("adamw",), "trials": 1, "steps": 1})
    open_sweep(mine, tmp_path / "s", cache_dir=cache_dir).work(cache_dir=cache_dir)
    (copy / "new.txt").write_text("a new document " * 50)
    with pytest.raises(LabError, match="trained on other text"):
        open_sweep(mine, tmp_path / "s", cache_dir=cache_dir)


def test_the_curve_keeps_the_best_of_each_factor_of_two() -> None:
    trials = [{"lr": lr, "final_loss": loss} for lr, loss in [(1.0, 4.0), (1.1, 3.9), (2.2, 3.94), (8.0, 3.92)]]
    curve = rate_curve(trials, exact=False)
    assert curve == [(1.1, 3.9), (2.2, 3.94), (8.0, 3.92)]
    assert good_rates(curve) == pytest.approx(8.0 / 1.1)
    assert good_rates([(1.0, 3.9), (2.0, 4.2), (4.0, 3.91)]) == 1.0
    assert good_rates([]) is None
