"""The training loop: batches, forward and backward, clip, step, evaluation, log and checkpoints. A step depends only on
the configuration and on the state in a checkpoint. On several processes every rank runs this loop over its rows of each
batch, and rank 0 alone writes the log.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spectrim.lab.config import TrainConfig
from spectrim.lab.data.batches import Batches, validation_batches
from spectrim.lab.data.prefetch import MicroBatches, move, prefetch
from spectrim.lab.data.tokens import Tokens
from spectrim.lab.errors import Interrupted
from spectrim.lab.logging.log import RunLog, StepRecord
from spectrim.lab.training import checkpoints
from spectrim.lab.training.clock import Clock
from spectrim.lab.training.device import rounding_environment
from spectrim.lab.training.evaluate import evaluate, evaluation_steps, frequency_buckets
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.interrupt import StopRequest
from spectrim.lab.training.learning_rate import learning_rate_factor
from spectrim.lab.training.monitoring import OnMeasure, monitor_run
from spectrim.lab.training.objective import language_loss
from spectrim.lab.training.processes import ONE_PROCESS, Parallel
from spectrim.lab.training.step_records import StepRecorder
from spectrim.optim.optimizer import SpectralOptimizer

__all__ = ["OnStep", "run_steps"]

OnStep = Callable[[StepRecord], None]


def run_steps(
    config: TrainConfig,
    folder: RunFolder,
    tokens: Tokens,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    on_step: OnStep | None,
    *,
    on_measure: OnMeasure | None = None,
    parallel: Parallel = ONE_PROCESS,
    module: nn.Module | None = None,
    compiled: bool = False,
) -> None:
    """Train from the last checkpoint, or from the start, to the last step.

    Args:
        config: of the run.
        folder: where rank 0 writes.
        tokens: the training and validation text.
        model: this rank's part of it.
        optimizer: over its parameters.
        device: where it is.
        on_step: called on rank 0 with every record that is logged.
        on_measure: called on rank 0 with every record of the monitor.
        parallel: this process among others.
        module: called in training in place of the model, such as a wrapper around it.
        compiled: whether it is compiled, which decides how it rounds.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the step it came in is done and in a checkpoint.
    """
    data, steps = config.data, config.steps
    shape = {"batch_size": data.batch_size, "sequence_length": data.sequence_length}
    part = (parallel.data_rank, parallel.data_ranks)
    batches = Batches(tokens.train, seed=config.seed, part=part, **shape)
    held_out = validation_batches(tokens.validation, batches=config.evaluation.batches, **shape)
    validation = [(move(inputs, device), move(targets, device)) for inputs, targets in held_out]
    texts = [array for stream in tokens.train for array in stream.arrays]
    buckets = frequency_buckets(texts, tokens.vocabulary_size).to(device)
    evaluate_after = evaluation_steps(steps, config.evaluation.times)
    peaks = [group["lr"] for group in optimizer.param_groups]

    identity: dict[str, Any] = {
        "config": config,
        "data_key": tokens.key,
        "machine": {**rounding_environment(device, compiled=compiled), **parallel.describe()},
        "parallel": parallel,
    }
    state = checkpoints.load_latest(folder.checkpoints, **identity)
    start = checkpoints.restore(state, model=model, optimizer=optimizer, parallel=parallel) if state else 0
    watched = (state or {}).get("monitor")
    del state
    model.train()
    trained = model if module is None else module
    clock = Clock(device)
    open_log: AbstractContextManager[RunLog | None] = nullcontext()
    file, tell = None, [on_measure] if on_measure is not None else []
    if parallel.is_first:
        file = folder.monitor_file
        open_log = run_log = RunLog(folder.log_file, resume_step=start, config=config)
        tell.insert(0, run_log.write_measurement)
    with (
        StopRequest(told=parallel.is_first) as stop,
        open_log as log,
        monitor_run(config, model, optimizer, clock, start=start, state=watched, file=file, tell=tell) as run_monitor,
        prefetch(batches, range(start, steps), accumulate=config.accumulate, device=device) as stream,
    ):

        def write(record: StepRecord) -> None:
            if log is not None:
                log.write(record)
                if on_step is not None:
                    on_step(record)

        records = StepRecorder(device, write, parallel=parallel)
        for step, micro_batches in enumerate(stream, start=start):
            factor = learning_rate_factor(step, config)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            parallel.seed(config.seed, step)
            clock.lap("rest_ms")
            loss = forward_backward(trained, micro_batches, config.precision)
            clock.lap("forward_backward_ms")
            if config.optimizer.gradient_clip and isinstance(optimizer, SpectralOptimizer):
                # As the authors of pre-clipping do: the global norm is that of pre-clipped gradients.
                optimizer.pre_clip_()
                clock.lap("optimizer_ms")
            norm = clip_gradient(model, config.optimizer.gradient_clip)
            clock.lap("gradient_clip_ms")
            optimizer.step()
            clock.lap("optimizer_ms")
            optimizer.zero_grad(set_to_none=True)
            record: dict[str, Any] = {
                "step": step + 1,
                "tokens": (step + 1) * config.tokens_per_step,
                "loss": None,  # not known yet, but first in the log
                "lr": (config.optimizer.lr or 0.0) * factor,
                "grad_norm": None,
            }
            clock.lap("rest_ms")
            if step + 1 in evaluate_after:
                evaluation = evaluate(
                    model, validation, buckets, device=device, precision=config.precision, parallel=parallel
                )
                record |= {"val_loss": evaluation.loss, "val_loss_by_frequency": evaluation.by_frequency}
                clock.lap("evaluation_ms")
            records.add(record, clock.read(), loss=loss, norm=norm)
            stopped_by = parallel.any_signal(stop.number)
            saves = (step + 1) % config.checkpoint_every == 0 or step + 1 == steps or stopped_by is not None
            if saves or step + 1 in evaluate_after:
                records.flush()
            clock.lap("logging_ms")
            if saves:
                # First the logs, then the checkpoint: they are never behind.
                watched = run_monitor.state_dict() if run_monitor is not None else None
                if log is not None:
                    log.sync()
                state = {"model": model, "optimizer": optimizer, "monitor": watched}
                checkpoints.save(folder.checkpoints, step=step + 1, **state, **identity)
                clock.lap("checkpoint_ms")
            if stopped_by is not None:
                raise Interrupted(stopped_by, f" after step {step + 1} of {steps}")


def forward_backward(model: nn.Module, micro_batches: MicroBatches, precision: str) -> Tensor:
    """Add the gradient of the mean loss over all micro-batches, which are of one size; returns that loss."""
    share = len(micro_batches)
    total: Tensor | None = None
    for index, (inputs, targets) in enumerate(micro_batches, start=1):
        with accumulating(model, more=index < share):
            loss = language_loss(model, inputs, targets, precision) / share
            loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def accumulating(module: nn.Module, *, more: bool) -> AbstractContextManager[Any]:
    """Context of a micro-batch: replicas exchange gradients after the last one alone."""
    inner = getattr(module, "_orig_mod", module)  # of a compiled one
    return inner.no_sync() if more and isinstance(inner, DistributedDataParallel) else nullcontext()


def clip_gradient(model: nn.Module, bound: float) -> Tensor:
    """Scale the gradient down to the bound on its global norm, and return the norm before; a bound of 0 only measures.

    Of a sharded gradient it is the norm of all shards; torch's functions take sharded and whole tensors one kind at a
    time, and a model may hold both.
    """
    having = [parameter for parameter in model.parameters() if parameter.grad is not None]
    whole = [parameter for parameter in having if not isinstance(parameter.grad, DTensor)]
    sharded = [parameter for parameter in having if isinstance(parameter.grad, DTensor)]
    kinds = [kind for kind in (whole, sharded) if kind] or [[]]
    norms = [full(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if bound:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, bound, norm)
    return norm


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
