"""Whose a folder is: one process's at a time, and one run's for good."""

import shutil
import threading
from pathlib import Path

import pytest

from lab_runs import StopError, assert_equal, final_state, log_without_times, stop_after
from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments import comparison as comparing
from spectrim.lab.experiments import sweep as sweeping
from spectrim.lab.experiments.comparison import compare
from spectrim.lab.experiments.runs import canonical_sweep
from spectrim.lab.experiments.settings import CompareConfig, SweepConfig
from spectrim.lab.experiments.sweep import open_sweep
from spectrim.lab.files import create_text
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.run import train


def test_of_processes_that_begin_in_one_new_folder_at_once_one_trains(
    small_config: TrainConfig, tmp_path: Path
) -> None:
    rounds, rivals = 40, 3
    barrier, trained = threading.Barrier(rivals), [0] * rounds

    def begin(resume: bool) -> None:
        for number in range(rounds):
            folder = RunFolder(tmp_path / str(number))
            barrier.wait()
            try:
                folder.check(small_config, resume=resume)
                folder.create(small_config, resume=resume)
                with folder.lock():
                    trained[number] += 1
                    barrier.wait()
            except LabError:
                barrier.wait()

    threads = [threading.Thread(target=begin, args=(index == 0,)) for index in range(rivals)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trained == [1] * rounds


def test_who_looked_before_another_began_is_refused(small_config: TrainConfig, tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.check(small_config, resume=False)
    second.check(small_config, resume=False)
    first.create(small_config)
    with pytest.raises(LabError, match="another process has begun a run in"):
        second.create(small_config)
    second.create(small_config, resume=True)
    with first.lock():
        # Not even a configuration that is written anew lets another in.
        first.update(small_config.model_copy(update={"steps": 7}))
        with pytest.raises(LabError, match="another process is training in"), second.lock():
            pass
    with second.lock():
        pass


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_once_also_where_there_are_no_links(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert create_text(tmp_path / "new" / "x", "mine")
    assert not create_text(tmp_path / "new" / "x", "yours")
    assert (tmp_path / "new" / "x").read_text() == "mine"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


def test_a_log_without_the_checkpoints_that_it_tells_of_is_kept(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(small_config, run, cache_dir=cache_dir, on_step=stop_after(4))
    log = (run / "log.jsonl").read_bytes()
    shutil.move(run / "checkpoints", tmp_path / "aside")
    for gone in (None, run / "checkpoints"):
        if gone is not None:
            gone.mkdir()
        with pytest.raises(LabError, match="has a log of 4 steps and no checkpoint to resume from"):
            train(small_config, run, resume=True, cache_dir=cache_dir)
    assert (run / "log.jsonl").read_bytes() == log
    (run / "checkpoints").rmdir()
    shutil.move(tmp_path / "aside", run / "checkpoints")
    train(small_config, run, resume=True, cache_dir=cache_dir)
    assert len(log_without_times(run)) == 6


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    with pytest.raises(StopError):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=stop_after(2))
    train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir)
    train(small_config, tmp_path / "whole", cache_dir=cache_dir)
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")


def at(config: TrainConfig, *places: Path) -> TrainConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": tuple(map(str, places))})})


@pytest.mark.parametrize("stop", [1, 4])
def test_data_that_was_moved_goes_on_and_other_data_does_not(
    small_config: TrainConfig, text_folder: Path, tmp_path: Path, cache_dir: Path, stop: int
) -> None:
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(text_folder, here)
    with pytest.raises(StopError):
        train(at(small_config, here), run, cache_dir=cache_dir, on_step=stop_after(stop))
    shutil.move(here, there)
    other = tmp_path / "other"
    shutil.copytree(there, other)
    (other / "0.txt").write_text("what nobody has said before " * 200)
    if stop == 4:
        with pytest.raises(LabError, match="trained on other text"):
            train(at(small_config, other), run, resume=True, cache_dir=cache_dir)
        assert str(here) in (run / "config.toml").read_text()
    train(at(small_config, there), run, resume=True, cache_dir=cache_dir)
    train(at(small_config, there), tmp_path / "whole", cache_dir=cache_dir)
    assert_equal(final_state(run)["model"], final_state(tmp_path / "whole")["model"])
    assert (run / "config.toml").read_text() == (tmp_path / "whole" / "config.toml").read_text()
    # Weights of a mixture are settings, and no places.
    with pytest.raises(LabError, match=r"another configuration: data\.sources"):
        train(at(small_config, Path(f"{there}@1"), Path(f"{other}@2")), run, resume=True, cache_dir=cache_dir)


def shared(config: TrainConfig, **more: object) -> dict[str, object]:
    settings = {**config.model_dump(), **more}
    return {key: value for key, value in settings.items() if key not in ("recipe", "seed")}


def test_a_comparison_goes_on_with_its_data_elsewhere(
    small_config: TrainConfig, text_folder: Path, tmp_path: Path, cache_dir: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(text_folder, here)
    config = CompareConfig(recipes=("adamw",), **shared(at(small_config, here)))
    first = compare(config, tmp_path / "runs", cache_dir=cache_dir)
    shutil.move(here, there)
    config = CompareConfig(recipes=("adamw", "muon"), **shared(at(small_config, there)))
    both = compare(config, tmp_path / "runs", cache_dir=cache_dir)
    assert both["recipes"]["adamw"]["seeds"] == first["recipes"]["adamw"]["seeds"]


@pytest.mark.parametrize("kind", ["compare", "sweep"])
def test_of_two_studies_that_begin_under_one_name_the_later_is_refused(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "study"
    make = {"compare": CompareConfig, "sweep": SweepConfig}[kind]
    mine = make(recipes=("adamw",), **shared(small_config))
    rival = make(recipes=("adamw",), **shared(small_config, steps=8))
    module = {"compare": comparing, "sweep": sweeping}[kind]
    prepare = module.prepare_tokens

    def meanwhile(*arguments: object) -> object:
        out.mkdir()
        other = comparing.canonical(rival, out) if kind == "compare" else canonical_sweep(rival)
        (out / "config.toml").write_text(other.to_toml())
        return prepare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "prepare_tokens", meanwhile)
    with pytest.raises(LabError, match="has other settings: steps is 8 there, 6 here"):
        {"compare": compare, "sweep": open_sweep}[kind](mine, out, cache_dir=cache_dir)  # type: ignore[operator]
    assert "steps = 8" in (out / "config.toml").read_text()
