import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lab_runs import StopError, assert_equal, checkpoint, final_state, log_without_times, stop_after
from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.training.checkpoints import Checkpoints
from spectrim.lab.training.run import train


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled once: a finished run, one stopped after step 5 with checkpoints of steps 2 and 4, one of another seed."""
    return {"folder": tmp_path_factory.mktemp("begun")}


@pytest.fixture
def whole(small_config: TrainConfig, begun: dict[str, Path], cache_dir: Path) -> Path:
    folder = begun["folder"]
    if "whole" not in begun:
        train(small_config, folder / "whole", cache_dir=cache_dir)
        for name, config in (("run", small_config), ("foreign", small_config.model_copy(update={"seed": 1}))):
            with pytest.raises(StopError):
                train(config, folder / name, cache_dir=cache_dir, on_step=stop_after(5))
        begun["whole"] = folder / "whole"
    return begun["whole"]


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(whole.parent / "run", tmp_path / "run"))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def damaged(path: Path, _: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def of_another_run(path: Path, whole: Path) -> None:
    shutil.copy(checkpoint(whole.parent / "foreign", 4), path)


def of_another_step(path: Path, _: Path) -> None:
    shutil.copy(checkpoint(path.parent.parent, 2), path)


def of_another_program(path: Path, _: Path) -> None:
    torch.save({"model": torch.zeros(3), "step": 4}, path)


def code(path: Path, _: Path) -> None:
    torch.save({"format": Trap(path.parent / "executed")}, path)


def bare_pickle(path: Path, _: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.parent / "executed")))


def a_folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path, _: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    path.unlink()
    os.mkfifo(path)


def without(key: str) -> Callable[[Path, Path], None]:
    def spoil(path: Path, _: Path) -> None:
        state = torch.load(path, weights_only=True)
        del state[key]
        torch.save(state, path)

    return spoil


def of_a_later_version(path: Path, _: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["config"]["no_such_setting"] = 1
    torch.save(state, path)


SPOILS = {
    a_folder: "its part 'state.pt' is missing",
    a_pipe: "it is no file",
    without("optimizer"): "its 'optimizer' is missing or damaged",
    without("step"): "its 'step' is missing or damaged",
    without("config"): "its 'config' is missing or damaged",
    of_a_later_version: "cannot be read .*unknown key 'no_such_setting'",
    truncated: "cannot be read",
    empty: "cannot be read",
    damaged: "is damaged",
    of_another_run: "is of another run .*seed is 1 there, 0 here",
    of_another_step: "is of step 2",
    of_another_program: "is not of format",
    code: "cannot be read",
    bare_pickle: "cannot be read",
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_checkpoint_that_is_not_whole_or_not_this_runs_is_named_and_the_one_before_is_used(
    spoil: Callable[[Path, Path], None], small_config: TrainConfig, whole: Path, run: Path, cache_dir: Path
) -> None:
    spoil(checkpoint(run, 4), whole)
    with pytest.warns(LabWarning, match=f"step-00000004.pt' is refused: .*{SPOILS[spoil]}.*going on from step 2"):
        train(small_config, run, resume=True, cache_dir=cache_dir)
    assert_equal(final_state(run), final_state(whole))
    assert log_without_times(run) == log_without_times(whole)
    assert not (run / "checkpoints" / "executed").exists()


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_left_alone(
    small_config: TrainConfig, whole: Path, run: Path, cache_dir: Path
) -> None:
    for step in (2, 4):
        truncated(checkpoint(run, step), whole)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(LabError, match=r"step-00000004.pt' is refused: .*step-00000002.pt' is refused: .*no other"):
        train(small_config, run, resume=True, cache_dir=cache_dir)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_a_killed_write_has_left_is_removed_and_what_was_refused_is_kept(
    small_config: TrainConfig, run: Path, cache_dir: Path
) -> None:
    (run / "checkpoints" / ".step-00000006.pt.abc.partial").write_bytes(b"half")
    (run / "checkpoints" / "step-00000009.pt").write_bytes(b"mine")
    with pytest.warns(LabWarning, match="step-00000009"):
        train(small_config, run, resume=True, cache_dir=cache_dir)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000004.pt", "step-00000006.pt", "step-00000009.pt"]


def test_a_change_of_what_rounding_depends_on_is_told(small_config: TrainConfig, run: Path, cache_dir: Path) -> None:
    torch.set_num_threads(2)
    with pytest.warns(LabWarning, match="threads was 1 until step 4 and is 2 now"):
        train(small_config, run, resume=True, cache_dir=cache_dir)


def test_an_optimizer_whose_state_could_not_be_read_back_is_refused_at_the_first_checkpoint(
    small_config: TrainConfig, tmp_path: Path
) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["rule"] = Path("x")
    with pytest.raises(LabError, match="the state of SGD cannot be kept in a checkpoint: it cannot be read"):
        Checkpoints(tmp_path, small_config, data_key="", machine={}).save(1, model, optimizer)
    assert list(tmp_path.iterdir()) == []
