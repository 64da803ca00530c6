"""One run: batches, forward and backward, clip, step, evaluation, log and checkpoints.

A run is a function of its configuration. Stopped at any moment and resumed, it ends with the same weights and the
same log as if it had not been stopped.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.lab import checkpoint
from spectrim.lab.batches import Batches, validation_batches
from spectrim.lab.config import TrainConfig
from spectrim.lab.corpus import resolve_sources
from spectrim.lab.dynamics import read_dynamics
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_json
from spectrim.lab.log import Record, RunLog, read_log
from spectrim.lab.measure import largest_singular_value, state_bytes, step_times, weight_norm
from spectrim.lab.model import build_model, check_preset, save_model
from spectrim.lab.recipes import build_optimizer, resolve
from spectrim.lab.results import Curve, RunResult
from spectrim.lab.run import RunFolder
from spectrim.lab.schedule import evaluation_steps, learning_rate_factor
from spectrim.lab.tokens import Tokens, prepare_tokens

__all__ = ["prepare", "train"]

OnStep = Callable[[Record], None]


def prepare(config: TrainConfig) -> TrainConfig:
    """Check a configuration and fill in what is left to defaults, so that it says everything about its run.

    Raises:
        LabError: a recipe, preset or device that there is not.
    """
    check_preset(config.model.preset)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise LabError("device 'cuda' is not available here, expected one of auto, cpu")
    data = config.data.model_copy(update={"sources": resolve_sources(config.data.sources)})
    return resolve(config.model_copy(update={"data": data}))


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    cache_dir: Path | None = None,
    on_step: OnStep | None = None,
) -> RunResult:
    """Train one model into the folder ``out``, or finish the run that was begun there.

    Args:
        config: what to train; see :func:`prepare`.
        out: a new or empty folder, or with ``resume`` the folder of a run with this configuration.
        resume: go on from the last checkpoint; a finished run is returned as it is.
        cache_dir: where tokens are cached, :func:`spectrim.lab.tokens.default_cache_dir` unless given.
        on_step: called with every record that is logged.

    Raises:
        LabError: the input cannot be served. ``out`` is then as it was.
    """
    config = prepare(config)
    folder = RunFolder(out)
    folder.check(config, resume=resume)
    if (finished := folder.result()) is not None:
        return finished
    tokens = prepare_tokens(config.data, cache_dir)
    device = torch.device(choose_device(config.device))
    # The caller's random state is left alone, and the run's own depends on nothing but its seed.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build_model(
            config.model.preset,
            vocabulary_size=config.data.vocabulary_size,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
        ).to(device)
        optimizer = build_optimizer(model, config)
        folder.create(config)
        run_steps(config, folder, tokens, model, optimizer, device, on_step)
    save_model(model, tokens, folder.model)
    result = measure(config, folder, tokens, model, optimizer)
    write_json(folder.result_file, result.model_dump(mode="json"))
    return result


def run_steps(
    config: TrainConfig,
    folder: RunFolder,
    tokens: Tokens,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    on_step: OnStep | None,
) -> None:
    """Everything between initialisation and result: from the last checkpoint, if any, to the last step."""
    data, steps = config.data, config.steps
    shape = {"batch_size": data.batch_size, "sequence_length": data.sequence_length}
    batches = Batches(tokens.train, seed=config.seed, **shape)
    validation = list(validation_batches(tokens.validation, batches=config.evaluation.batches, **shape))
    evaluate_after = evaluation_steps(steps, config.evaluation.times)
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = list(model.parameters())

    state = checkpoint.load_latest(folder.checkpoints, data_key=tokens.key)
    start = checkpoint.restore(state, model=model, optimizer=optimizer) if state else 0
    del state
    clock = Clock(device)
    with RunLog(folder.log_file, resume_step=start) as log:
        for step in range(start, steps):
            factor = learning_rate_factor(
                step, steps=steps, warmup_steps=config.warmup_steps, final_fraction=config.schedule.final_fraction
            )
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            inputs, targets = (part.to(device) for part in batches(step))
            clock.lap("rest_ms")
            loss = language_loss(model, inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            clock.lap("forward_backward_ms")
            norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.gradient_clip)
            clock.lap("rest_ms")
            optimizer.step()
            clock.lap("optimizer_ms")
            optimizer.zero_grad(set_to_none=True)
            record: dict[str, Any] = {
                "step": step + 1,
                "tokens": (step + 1) * config.tokens_per_step,
                "loss": loss.item(),
                "lr": (config.optimizer.lr or 0.0) * factor,
                "grad_norm": norm.item(),
            }
            clock.lap("rest_ms")
            if step + 1 in evaluate_after:
                record["val_loss"] = evaluate(model, validation, device)
                clock.lap("evaluation_ms")
            record |= clock.read()
            log.write(record)  # type: ignore[arg-type]
            if on_step is not None:
                on_step(record)  # type: ignore[arg-type]
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
                clock.lap("rest_ms")
                # First the log, then the checkpoint: the log is never behind.
                log.sync()
                checkpoint.save(
                    folder.checkpoints, step=step + 1, data_key=tokens.key, model=model, optimizer=optimizer
                )
                clock.lap("checkpoint_ms")


def language_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    logits = model(input_ids=inputs).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Mean loss per token over the fixed validation batches."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for inputs, targets in batches:
        total += language_loss(model, inputs.to(device), targets.to(device)).double() * targets.numel()
    model.train()
    return float(total) / sum(targets.numel() for _, targets in batches)


class Clock:
    """Splits the time since it was started into named shares, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shares: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a share."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        self._shares[name] = self._shares.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now

    def read(self) -> dict[str, float]:
        """The shares since the last reading, rounded to a microsecond."""
        shares, self._shares = self._shares, {}
        return {name: round(share, 3) for name, share in shares.items()}


def measure(
    config: TrainConfig, folder: RunFolder, tokens: Tokens, model: nn.Module, optimizer: torch.optim.Optimizer
) -> RunResult:
    """The result of a run whose steps are all done; times and losses come from its log."""
    records = read_log(folder.log_file)
    evaluated = [record for record in records if "val_loss" in record]
    settings = config.optimizer
    assert settings.lr is not None
    assert settings.embedding_lr is not None
    assert settings.head_lr is not None
    return RunResult(
        recipe=config.recipe,
        seed=config.seed,
        lr=settings.lr,
        embedding_lr=settings.embedding_lr,
        head_lr=settings.head_lr,
        clip_bound=settings.clip_bound,
        final_loss=evaluated[-1]["val_loss"],
        state_bytes=state_bytes(optimizer),
        weight_norm=weight_norm(model),
        largest_singular_value=largest_singular_value(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        curve=Curve(
            tokens=tuple(record["tokens"] for record in evaluated),
            val_loss=tuple(record["val_loss"] for record in evaluated),
        ),
        data_key=tokens.key,
        environment=environment(config),
        dynamics=read_dynamics(records),
        **step_times(records),
    )


def environment(config: TrainConfig) -> dict[str, str | int]:
    """What numbers and times depend on beside the configuration."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "device": choose_device(config.device),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def choose_device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
