"""What the ranks of lab/training/test_processes.py run: each case is one launch, and fails by an exception."""

import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401 - once, before ranks are forked

import spectrim.lab.training.placement  # noqa: F401
import worlds
from spectrim.cli import main as spectrim_command
from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import Interrupted, LabError
from spectrim.lab.recipes import external
from spectrim.lab.settings import read_toml
from spectrim.lab.training.processes import Parallel, open_parallel
from spectrim.lab.training.run import train

Train = Callable[..., Any]


def changed(config: TrainConfig, **settings: Any) -> TrainConfig:
    """The configuration with other settings; data__batch_size is that of the table data."""
    for key, value in settings.items():
        table, _, name = key.rpartition("__")
        update = {table: getattr(config, table).model_copy(update={name: value})} if table else {name: value}
        config = config.model_copy(update=update)
    return config


def stopped(parallel: Parallel, run: Train, config: TrainConfig, out: Path, *, after: int) -> None:
    """Train until rank 0, and no other, is sent a signal; every rank must end with the same step."""

    def on_step(record: Any) -> None:
        if record["step"] == after:
            os.kill(os.getpid(), signal.SIGTERM)

    message = ""
    try:
        run(config, out, on_step=on_step, parallel=parallel)
    except Interrupted as error:
        message = str(error)
    assert parallel.gather(message) == [f"stopped by SIGTERM after step {after} of {config.steps}"] * parallel.ranks


def refused(parallel: Parallel, run: Train, config: TrainConfig, out: Path) -> list[str]:
    """What every rank says to a configuration that cannot be served."""
    message = ""
    try:
        run(config, out, parallel=parallel)
    except LabError as error:
        message = str(error)
    messages: list[str] = parallel.gather(message)
    assert not out.exists()
    return messages


def two(parallel: Parallel, run: Train, config: TrainConfig, folder: Path) -> None:
    for mode in ("fsdp", "ddp", "tp"):
        run(config, folder / mode, parallel=replace(parallel, mode=mode))
    run(changed(config, accumulate=2), folder / "accumulate", parallel=replace(parallel, mode="ddp"))
    for recipe in ("adamw+clip", "spectra"):
        run(changed(config, recipe=recipe, optimizer__lr=0.01), folder / recipe, parallel=parallel)
    spectra = changed(config, recipe="spectra", optimizer__lr=0.01)
    stopped(parallel, run, spectra, folder / "spectra-2-to-1", after=3)
    # Tied weights, and dropout.
    gpt2 = changed(config, model__architecture="gpt2", model__overrides={"resid_pdrop": 0.2}, data__batch_size=6)
    run(gpt2, folder / "gpt2", parallel=parallel)
    stopped(parallel, run, gpt2, folder / "gpt2-parts", after=3)
    run(gpt2, folder / "gpt2-parts", resume=True, parallel=parallel)

    run(config, folder / "4-to-2", resume=True, parallel=parallel)
    sys.path.insert(0, str(folder))
    external.trust(["fatal:Fatal"])
    run(changed(config, recipe="fatal:Fatal"), folder / "killed", resume=True, parallel=parallel)
    run(config, folder / "1-to-2", resume=True, parallel=parallel)
    stopped(parallel, run, config, folder / "2-to-1", after=3)

    ours = changed(config, steps=6 + parallel.rank, data__batch_size=4)
    assert refused(parallel, run, ours, folder / "no") == ["ranks disagree: steps is 6 on rank 0, 7 on rank 1"] * 2
    mode: Any = ("fsdp", "ddp")[parallel.rank]
    messages = refused(replace(parallel, mode=mode), run, config, folder / "no")
    assert messages == ["ranks disagree: --parallel is 'fsdp' on rank 0, 'ddp' on rank 1"] * 2
    for message in refused(parallel, run, changed(config, data__batch_size=3), folder / "no"):
        assert "data.batch_size=3 is of all ranks together: expected a multiple of 2 data-parallel ranks" in message
    gpt2_by_tensors = changed(config, model__architecture="gpt2", model__overrides={})
    for message in refused(replace(parallel, mode="tp"), run, gpt2_by_tensors, folder / "no"):
        assert "does not serve the architecture 'gpt2'" in message
    # What rank 0 finds alone, all ranks are told.
    for message in refused(parallel, run, changed(config, data__sequence_length=100_000), folder / "no"):
        assert "one sequence needs 100001" in message


def four(parallel: Parallel, run: Train, config: TrainConfig, folder: Path) -> None:
    run(config, folder / "hsdp-on-4", parallel=replace(parallel, mode="hsdp"))
    stopped(parallel, run, config, folder / "4-to-2", after=3)


def killed(parallel: Parallel, run: Train, config: TrainConfig, folder: Path) -> None:
    """Rank 1 ends in the middle of the third step, so rank 0 must fail."""
    sys.path.insert(0, str(folder))
    os.environ["KILLED_IN"] = "step"
    external.trust(["fatal:Fatal"])
    run(changed(config, recipe="fatal:Fatal"), folder / "killed", parallel=parallel)


FATAL = '''
import os, pathlib, signal
import torch

class Fatal(torch.optim.AdamW):
    """Kills rank 1 in the middle of its third step, or of the checkpoint after its fourth."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.taken = 0

    def die_in(self, moment):
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if os.environ.get("RANK") == "1" and os.environ.get("KILLED_IN") == moment and first_attempt:
            pathlib.Path(__file__).with_name(f"killed-in-{moment}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, closure=None):
        self.taken += 1
        if self.taken == 3:
            self.die_in("step")
        return super().step(closure)

    def state_dict(self):
        if self.taken == 4:
            self.die_in("save")
        return super().state_dict()
'''


def main(case: str, rank: int, ranks: int, port: int, folder: Path, cache_dir: Path) -> None:
    """What one rank runs, in a process of its own."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config = TrainConfig.parse(read_toml(folder / "config.toml"), source="test")

    def run(config: TrainConfig, out: Path, **options: Any) -> None:
        train(config, out, cache_dir=cache_dir, **options)

    with open_parallel(None) as parallel:
        {"two": two, "four": four, "killed": killed}[case](parallel, run, config, folder)


def restarting(command: list[str], folder: Path) -> int:
    """A command on two ranks under torchrun's agent, which starts them once more when one of them ends."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        run_id="restarting",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method=worlds.context().get_start_method(),
    )
    elastic_launch(settings, _command_on_rank)(command, folder)
    return 0


def _command_on_rank(command: list[str], folder: Path) -> None:
    os.environ["KILLED_IN"] = "save"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    sys.exit(spectrim_command(command))


def launch(case: str, ranks: int, folder: Path, cache_dir: Path) -> list[int | None]:
    """Run a case on several ranks; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here: Any = worlds.context()
    arguments = [(case, rank, ranks, port, folder, cache_dir) for rank in range(ranks)]
    processes = [here.Process(target=main, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(worlds.PATIENCE)
    return [process.exitcode for process in processes]
