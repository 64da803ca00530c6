"""The lab under torchrun: the same run as on one process, whatever the layout, the faults and the number of ranks.

One process is the oracle. Ranks add up the same gradient in another order, so that losses differ by a few units in the
last place of float32 (1e-7 each); AdamW then moves weights whose gradient is nearly zero by a whole step either way,
and after six steps runs with other sums differ by some 1e-6. A rank that saw the wrong rows, or a mean over the wrong
number of them, shows in the third digit.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import worlds
from lab_runs import StopError, assert_equal, log_without_times, stop_after
from parallel_cases import FATAL, launch, restarting
from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.training import checkpoints
from spectrim.lab.training.processes import open_parallel
from spectrim.lab.training.run import train

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config(text_folder: Path) -> TrainConfig:
    """Four rows a batch, two heads for two ranks, nine validation rows that no number of ranks divides."""
    from spectrim.lab.config import DataConfig, EvaluationConfig, ModelConfig

    return TrainConfig(
        recipe="torch.optim:AdamW",
        steps=6,
        checkpoint_every=2,
        data=DataConfig(sources=(str(text_folder),), vocabulary_size=300, batch_size=4, sequence_length=16),
        model=ModelConfig(preset="tiny", overrides={"num_attention_heads": 2, "num_key_value_heads": 2}),
        evaluation=EvaluationConfig(times=3, batches=2),
    )


@pytest.fixture(scope="module")
def runs(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder in which ranks have trained, beside the same runs on one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    train(config, folder / "one", cache_dir=cache_dir)
    for recipe in ("adamw+clip", "spectra"):
        optimizer = config.optimizer.model_copy(update={"lr": 0.01})
        alone = config.model_copy(update={"recipe": recipe, "optimizer": optimizer})
        train(alone, folder / f"one-{recipe}", cache_dir=cache_dir)
    with pytest.raises(StopError):
        train(config, folder / "1-to-2", cache_dir=cache_dir, on_step=stop_after(3))
    (folder / "fatal.py").write_text(FATAL)
    assert launch("killed", 2, folder, cache_dir) == [1, -9]
    assert launch("four", 4, folder, cache_dir) == [0, 0, 0, 0]
    shutil.copytree(folder / "4-to-2", folder / "4-to-1")
    assert launch("two", 2, folder, cache_dir) == [0, 0]
    return folder


def assert_same_run(run: Path, alone: Path) -> None:
    for record, expected in zip(log_without_times(run), log_without_times(alone), strict=True):
        assert record.keys() == expected.keys()
        assert record["step"] == expected["step"]
        for key in ("loss", "grad_norm", "val_loss"):
            if key in expected:
                assert record[key] == pytest.approx(expected[key], rel=TOLERANCE), (run.name, record["step"], key)
        if "val_loss" in expected:
            assert record["val_loss_by_frequency"] == pytest.approx(expected["val_loss_by_frequency"], rel=TOLERANCE)
    weights, expected = load_file(run / "model" / "model.safetensors"), load_file(alone / "model" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.linalg.norm(weight - expected[name]) < 1e-4 * torch.linalg.norm(expected[name]), name


@pytest.mark.parametrize("name", ["fsdp", "ddp", "tp", "accumulate", "hsdp-on-4"])
def test_every_layout_follows_the_curve_of_one_process(runs: Path, name: str) -> None:
    assert_same_run(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["4-to-2", "1-to-2", "killed"])
def test_a_run_goes_on_with_another_number_of_ranks_and_where_one_was_killed(runs: Path, name: str) -> None:
    assert_same_run(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["2-to-1", "4-to-1"])
def test_one_process_goes_on_from_what_several_have_saved(
    config: TrainConfig, runs: Path, cache_dir: Path, name: str
) -> None:
    ranks = int(name[0])
    with pytest.warns(LabWarning) as told:
        train(config, runs / name, resume=True, cache_dir=cache_dir)
    assert [str(each.message).partition(":")[0] for each in told] == [
        f"ranks was {ranks} until step 3 and is 1 now",
        "parallel was fsdp until step 3 and is one process now",
    ]
    assert_same_run(runs / name, runs / "one")
    assert [path.name for path in sorted((runs / name / "checkpoints").iterdir())] == [
        "step-00000004.pt",
        "step-00000006.pt",
    ]


@pytest.mark.parametrize("recipe", ["adamw+clip", "spectra"])
def test_recipes_follow_the_curve_of_one_process(runs: Path, recipe: str) -> None:
    assert_same_run(runs / recipe, runs / f"one-{recipe}")


def test_one_process_goes_on_with_the_sharded_state_of_a_spectral_recipe(
    config: TrainConfig, runs: Path, cache_dir: Path
) -> None:
    optimizer = config.optimizer.model_copy(update={"lr": 0.01})
    spectra = config.model_copy(update={"recipe": "spectra", "optimizer": optimizer})
    with pytest.warns(LabWarning, match="rounding may differ"):
        train(spectra, runs / "spectra-2-to-1", resume=True, cache_dir=cache_dir)
    assert_same_run(runs / "spectra-2-to-1", runs / "one-spectra")


def test_the_same_ranks_resume_bit_for_bit_with_dropout(runs: Path) -> None:
    assert log_without_times(runs / "gpt2-parts") == log_without_times(runs / "gpt2")
    parts, whole = (load_file(runs / name / "model" / "model.safetensors") for name in ("gpt2-parts", "gpt2"))
    assert_equal(parts, whole)


def test_ranks_leave_what_one_process_leaves(runs: Path) -> None:
    names = [
        {path.name for path in (runs / run).iterdir() if not path.name.startswith("events")} for run in ("one", "fsdp")
    ]
    assert names[0] == names[1]
    kept = [path.name for path in sorted((runs / "fsdp" / "checkpoints").iterdir())]
    assert kept == ["step-00000004", "step-00000006"]
    assert not list((runs / "fsdp").rglob("*.partial"))


@pytest.mark.parametrize("part", ["state.pt", ".metadata", "__0_0.distcp", "missing"])
def test_a_damaged_folder_is_named_and_the_one_before_is_used(
    config: TrainConfig, runs: Path, cache_dir: Path, tmp_path: Path, part: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "fsdp", run)
    (run / "result.json").unlink()
    last = run / "checkpoints" / "step-00000006"
    if part == "missing":
        (last / "__1_0.distcp").unlink()
    else:
        content = bytearray((last / part).read_bytes())
        content[len(content) // 2] ^= 1
        (last / part).write_bytes(content)
    with pytest.warns(LabWarning) as told:
        train(config, run, resume=True, cache_dir=cache_dir)
    assert re.search("step-00000006' is refused: .* going on from step 4", str(told[0].message))
    assert_same_run(run, runs / "one")


def test_an_index_that_asks_for_anything_but_tensors_is_not_opened(runs: Path, tmp_path: Path) -> None:
    import pickle

    from spectrim.lab.training.sharded_checkpoints import IndexReader

    (tmp_path / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system is nothing"):
        IndexReader(tmp_path).read_metadata()
    assert IndexReader(runs / "fsdp" / "checkpoints" / "step-00000006").read_metadata().state_dict_metadata


def test_weights_and_moments_are_read_without_an_optimizer(config: TrainConfig, runs: Path) -> None:
    whole, parts = (
        checkpoints.read_parts(runs / run / "checkpoints" / name, ["exp_avg"])
        for run, name in (("one", "step-00000006.pt"), ("fsdp", "step-00000006"))
    )
    for expected, found in zip(whole, parts, strict=True):
        assert expected.keys() == found.keys()
    for name, moment in whole[1].items():
        assert torch.linalg.norm(parts[1][name]["exp_avg"] - moment["exp_avg"]) < 1e-3 * torch.linalg.norm(
            moment["exp_avg"]
        )
    exported = load_file(runs / "fsdp" / "model" / "model.safetensors")
    assert all(torch.equal(parts[0][name], weight) for name, weight in exported.items())


def test_a_member_of_an_enum_may_be_pickled_as_early_python_3_11_does_and_nothing_else_so() -> None:
    import io
    import pickle

    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as ENCODING

    from spectrim.lab.training.sharded_checkpoints import IndexUnpickler

    class Got:
        def __init__(self, *what: object) -> None:
            self.what = what

        def __reduce__(self) -> tuple[object, ...]:
            return getattr, self.what

    member = Got(ENCODING, "TORCH_CHANNELS_LAST")
    assert IndexUnpickler(io.BytesIO(pickle.dumps(member))).load() is ENCODING.TORCH_CHANNELS_LAST
    for bad in (Got(ENCODING, "__class__"), Got(torch.Size, "numel")):
        with pytest.raises(pickle.UnpicklingError, match="is nothing that an index is made of"):
            IndexUnpickler(io.BytesIO(pickle.dumps(bad))).load()


def test_the_agent_of_torchrun_goes_on_by_itself_where_a_rank_was_killed_while_it_saved(
    config: TrainConfig, runs: Path, cache_dir: Path
) -> None:
    own = config.model_copy(update={"recipe": "fatal:Fatal"})
    (runs / "fatal.toml").write_text(own.to_toml())
    command = ["train", "fatal:Fatal", "--config", "fatal.toml", "--out", "restarted", "--cache-dir", str(cache_dir)]
    done = worlds.alone(restarting, command, runs)
    assert done.code == 0, done.err
    assert (runs / "killed-in-save").exists()
    # The class is torch's AdamW, so the runs are one but for their names.
    assert_same_run(runs / "restarted", runs / "one")


def test_a_mode_needs_torchrun_and_a_name_that_is_known() -> None:
    with pytest.raises(LabError, match="--parallel 'zero': expected one of fsdp, ddp, hsdp, tp"), open_parallel("zero"):
        pass
    with pytest.raises(LabError, match="--parallel tp needs several processes: torchrun"), open_parallel("tp"):
        pass
