"""The lab on a GPU, as far as a machine without one can tell: what it reads and when, its clock, precision,
and compiling."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import spectrim.lab.training.run
from lab_runs import StopError, assert_equal, final_state, log_without_times, stop_after
from spectrim.lab.config import MonitorConfig, TrainConfig
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.experiments.comparison import compare
from spectrim.lab.experiments.runs import canonical_sweep
from spectrim.lab.experiments.settings import CompareConfig, SweepConfig
from spectrim.lab.logging.log import StepRecord
from spectrim.lab.settings import read_toml
from spectrim.lab.training import step_records
from spectrim.lab.training.checkpoints import Checkpoints
from spectrim.lab.training.clock import Clock
from spectrim.lab.training.device import choose_precision
from spectrim.lab.training.run import prepare, train
from spectrim.monitor import fetch


class Reads(TorchDispatchMode):
    """Counts operators that read a number from a tensor, by the step in which they do."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.counts = 0, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.counts[self.step] += 1
        return func(*args, **(kwargs or {}))


class Event:
    """Has come after so many questions, or when it is waited for."""

    def __init__(self) -> None:
        self.questions = 2

    def query(self) -> bool:
        self.questions -= 1
        return self.questions < 0

    def synchronize(self) -> None:
        self.questions = 0


@pytest.fixture
def like_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are fetched for four steps together, and arrive late."""

    def begin_copy(tensor: torch.Tensor) -> tuple[torch.Tensor, Event]:
        return tensor.clone(), Event()

    monkeypatch.setitem(step_records.READ_EVERY, "cpu", 4)
    monkeypatch.setattr(fetch, "begin_copy", begin_copy)


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    reads = Reads()
    before = spectrim.lab.training.loop.forward_backward

    def next_step(*arguments: Any) -> Any:
        reads.step += 1
        return before(*arguments)

    monkeypatch.setattr(spectrim.lab.training.loop, "forward_backward", next_step)
    with reads:
        yield reads


@pytest.fixture
def longer(small_config: TrainConfig) -> TrainConfig:
    """A run in which a step that is not evaluated, saved or measured is the usual one."""
    settings = {"steps": 12, "checkpoint_every": 9, "recipe": "torch.optim:SGD"}
    evaluation = small_config.evaluation.model_copy(update={"times": 1})
    return small_config.model_copy(
        update={**settings, "evaluation": evaluation, "monitor": MonitorConfig(every=5, exact_times=0)}
    )


def test_no_step_reads_a_number_from_the_device_but_where_it_is_evaluated_or_saved(
    longer: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, like_a_device: None
) -> None:
    """Neither do we, nor the model of transformers; the monitor has a test of its own."""
    told: list[int] = []
    config = longer.model_copy(update={"monitor": MonitorConfig(every=0)})
    with counting(monkeypatch) as reads:
        train(config, tmp_path / "run", cache_dir=cache_dir, on_step=lambda record: told.append(reads.step))
    assert {step for step, count in reads.counts.items() if count} <= {9, 12}
    # Told with the first step after the copy has arrived, and all of them before a checkpoint or an evaluation.
    assert told == [7, 7, 7, 7, 9, 9, 9, 9, 9, 12, 12, 12]


def test_the_log_is_the_same_however_late_its_numbers_come(
    longer: TrainConfig, tmp_path: Path, cache_dir: Path, request: pytest.FixtureRequest
) -> None:
    train(longer, tmp_path / "at once", cache_dir=cache_dir)
    request.getfixturevalue("like_a_device")
    train(longer, tmp_path / "late", cache_dir=cache_dir)
    assert log_without_times(tmp_path / "late") == log_without_times(tmp_path / "at once")
    at_once, late = ((tmp_path / name / "monitor.jsonl").read_text().splitlines() for name in ("at once", "late"))
    assert [line.split(',"ms"')[0] for line in late] == [line.split(',"ms"')[0] for line in at_once]


@pytest.mark.parametrize("stop", [3, 9, 11])
def test_a_run_whose_numbers_come_late_resumes_as_any_other(
    longer: TrainConfig, tmp_path: Path, cache_dir: Path, stop: int, like_a_device: None
) -> None:
    train(longer, tmp_path / "whole", cache_dir=cache_dir)
    with pytest.raises(StopError):
        train(longer, tmp_path / "parts", cache_dir=cache_dir, on_step=stop_after(stop))
    train(longer, tmp_path / "parts", resume=True, cache_dir=cache_dir)
    assert_equal(final_state(tmp_path / "parts", 12), final_state(tmp_path / "whole", 12))
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")


class TimedEvent:
    """An event on a device that works through one a millisecond, and is asked only when it has come by."""

    recorded = 0
    done = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at = TimedEvent.recorded = TimedEvent.recorded + 1

    def synchronize(self) -> None:
        TimedEvent.done = max(TimedEvent.done, self.at)

    def elapsed_time(self, other: "TimedEvent") -> float:
        assert TimedEvent.done >= other.at
        return float(other.at - self.at)


def test_on_a_device_shares_are_times_between_its_events_and_nobody_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", TimedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = Clock(torch.device("cuda", 0))
    laps = []
    for _ in range(2):
        for name in ("forward_backward_ms", "optimizer_ms", "optimizer_ms", "rest_ms"):
            clock.lap(name)
        clock.move("optimizer_ms", "monitor_ms", 5.0)  # which the host took
        laps.append(clock.read())
    assert TimedEvent.done == 0
    for each in laps:
        assert each.milliseconds() == {"forward_backward_ms": 1.0, "optimizer_ms": 2.0, "rest_ms": 1.0}


# -- Precision and device ----------------------------------------------------------------------------------------------


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, bf16: bool = True) -> None:
    """What the lab asks about a GPU, answered; training stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    for module in (spectrim.lab.training.run, spectrim.lab.training.device):
        monkeypatch.setattr(module, "choose_device", lambda name: "cuda")
    monkeypatch.setattr(spectrim.lab.training.run, "training_device", lambda name: torch.device("cpu"))


def test_precision_is_bf16_where_a_gpu_has_it_and_float32_elsewhere(
    small_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(small_config).precision == "float32"
    assert choose_precision("auto", "cpu") == "float32"
    assert choose_precision("bf16", "cpu") == "bf16"
    for bf16, expected in ((True, "bf16"), (False, "float32")):
        with monkeypatch.context() as patch:
            on_a_gpu(patch, bf16=bf16)
            assert prepare(small_config).precision == expected
            explicit = small_config.model_copy(update={"precision": "float32"})
            assert prepare(explicit).precision == "float32"


def test_a_run_keeps_the_precision_that_it_began_with(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_a_gpu(patch)
        with pytest.raises(StopError):
            train(small_config, run, cache_dir=cache_dir, on_step=stop_after(3))
    assert read_toml(run / "config.toml")["precision"] == "bf16"
    result = train(small_config, run, resume=True, cache_dir=cache_dir)
    assert result.environment["precision"] == "bf16"
    train(small_config.model_copy(update={"precision": "bf16"}), tmp_path / "named", cache_dir=cache_dir)
    assert_equal(final_state(run)["model"], final_state(tmp_path / "named")["model"])
    train(small_config, tmp_path / "elsewhere", cache_dir=cache_dir)
    assert read_toml(tmp_path / "elsewhere" / "config.toml")["precision"] == "float32"
    asked = small_config.model_copy(update={"precision": "float32"})
    with pytest.raises(LabError, match="precision is 'bf16' there, 'float32' here"):
        train(asked, run, resume=True, cache_dir=cache_dir)


def test_comparisons_and_sweeps_settle_their_precision_when_they_begin(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = small_config.model_dump(exclude={"recipe", "seed"})
    config = CompareConfig(**{**shared, "steps": 2}, recipes=("adamw",))
    with monkeypatch.context() as patch:
        on_a_gpu(patch)
        compare(config, tmp_path / "comparison", cache_dir=cache_dir)
        assert canonical_sweep(SweepConfig(**shared, recipes=("adamw",))).precision == "bf16"
    assert canonical_sweep(SweepConfig(**shared, recipes=("adamw",))).precision == "float32"
    summary = compare(
        config.model_copy(update={"recipes": ("adamw", "signum")}), tmp_path / "comparison", cache_dir=cache_dir
    )
    assert summary["config"]["precision"] == "bf16"
    runs = [read_toml(file)["precision"] for file in (tmp_path / "comparison").glob("*/seed-0/config.toml")]
    assert runs == ["bf16", "bf16"]
    for entry in summary["recipes"].values():
        assert entry["optimizer_share"] == pytest.approx(entry["optimizer_ms"] / entry["step_ms"])


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:one", "mps", "cpu:0"])
def test_a_device_that_is_not_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(LabError, match=f"device='{name}': expected one of auto, cpu, cuda, cuda:N"):
        TrainConfig.parse({"recipe": "adamw", "device": name}, source="options")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_here_is_refused(small_config: TrainConfig, name: str) -> None:
    with pytest.raises(LabError, match=f"device '{name}' is not available here, expected one of auto, cpu"):
        prepare(small_config.model_copy(update={"device": name}))


# -- Compiling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile traces forward and backward, but leaves the kernels as they are: that takes a second."""
    found: list[Any] = []
    compile_model = torch.compile

    def quickly(model: Any, **options: Any) -> Any:
        found.append(compile_model(model, backend="aot_eager", **options))
        return found[-1]

    monkeypatch.setattr(torch, "compile", quickly)
    return found


def test_a_compiled_run_trains_evaluates_and_exports_as_any_other(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, compiled: list[Any]
) -> None:
    plain = train(small_config, tmp_path / "plain", cache_dir=cache_dir)
    assert not compiled
    result = train(small_config, tmp_path / "run", cache_dir=cache_dir, compiled=True)
    assert len(compiled) == 1
    assert result.environment["compiled"] == "yes"
    assert plain.environment["compiled"] == "no"
    assert result.final_loss == pytest.approx(plain.final_loss, rel=1e-4)
    ours, theirs = final_state(tmp_path / "run"), final_state(tmp_path / "plain")
    assert ours["model"].keys() == theirs["model"].keys()
    assert read_toml(tmp_path / "run" / "config.toml") == read_toml(tmp_path / "plain" / "config.toml")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert_equal(dict(exported.state_dict()), dict(ours["model"]))


@pytest.mark.parametrize("then", [True, False])
def test_a_compiled_run_resumes_compiled_to_the_bit_and_otherwise_with_a_warning(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, compiled: list[Any], then: bool
) -> None:
    train(small_config, tmp_path / "whole", cache_dir=cache_dir, compiled=True)
    with pytest.raises(StopError):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, compiled=True, on_step=stop_after(3))
    told = (
        contextlib.nullcontext() if then else pytest.warns(LabWarning, match="compiled was yes until step 2 and is no")
    )
    with told:
        train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir, compiled=then)
    if then:
        assert_equal(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
        assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")


def test_a_checkpoint_from_before_models_were_compiled_is_gone_on_with_without_a_word(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = tmp_path / "run"

    def stop(record: StepRecord) -> None:
        if record["step"] == 3:
            raise StopError

    with pytest.raises(StopError):
        train(small_config, run, cache_dir=cache_dir, on_step=stop)
    for path in (run / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        del state["machine"]["compiled"]
        torch.save(state, path)
        Checkpoints(path.parent, prepare(small_config), state["data_key"], {}).read(path)
    train(small_config, run, resume=True, cache_dir=cache_dir)
    assert not [each for each in recwarn if issubclass(each.category, LabWarning)]
