"""The training loop: batches, forward and backward, clip, step, evaluation, log and checkpoints. A step depends only on
the configuration and on the state in a checkpoint. On several processes every rank runs this loop over its rows of each
batch, and rank 0 alone writes the log.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
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
from spectrim.lab.training.checkpoints import Checkpoints, restore
from spectrim.lab.training.clock import Clock
from spectrim.lab.training.device import rounding_environment
from spectrim.lab.training.evaluate import Evaluation, evaluate, evaluation_steps, frequency_buckets
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.interrupt import StopRequest
from spectrim.lab.training.learning_rate import learning_rate_factor
from spectrim.lab.training.monitoring import OnMeasure, RunMonitor
from spectrim.lab.training.objective import language_loss
from spectrim.lab.training.processes import ONE_PROCESS, Parallel
from spectrim.lab.training.step_records import StepRecorder
from spectrim.optim.optimizer import SpectralOptimizer

__all__ = ["OnStep", "Training", "run_steps"]

OnStep = Callable[[StepRecord], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run on this rank: settings, data, model and optimizer, and the callbacks that follow it."""

    config: TrainConfig
    folder: RunFolder
    """Rank 0 writes to it."""
    tokens: Tokens
    model: nn.Module
    """This rank's part of the model."""
    module: nn.Module
    """Called in training in place of the model: the model, or a wrapper around it."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    parallel: Parallel = ONE_PROCESS
    compiled: bool = False
    """True if ``module`` is compiled, which changes rounding."""
    on_step: OnStep | None = None
    """Called on rank 0 with every record that is logged."""
    on_measure: OnMeasure | None = None
    """Called on rank 0 with every record of the monitor."""

    @property
    def machine(self) -> dict[str, str | int]:
        """The settings outside the configuration that decide rounding."""
        return {**rounding_environment(self.device, compiled=self.compiled), **self.parallel.describe()}

    def batches(self) -> Batches:
        """This rank's part of every training batch."""
        data, parallel = self.config.data, self.parallel
        return Batches(
            self.tokens.train,
            batch_size=data.batch_size,
            sequence_length=data.sequence_length,
            seed=self.config.seed,
            part=(parallel.data_rank, parallel.data_ranks),
            corrupted=data.corrupted,
            vocabulary_size=self.tokens.vocabulary_size,
        )

    def evaluator(self) -> Callable[[], Evaluation]:
        """A function that evaluates the model on the validation batches."""
        config, device = self.config, self.device
        held_out = validation_batches(
            self.tokens.validation,
            batches=config.evaluation.batches,
            batch_size=config.data.batch_size,
            sequence_length=config.data.sequence_length,
        )
        batches = [(move(inputs, device), move(targets, device)) for inputs, targets in held_out]
        texts = [array for stream in self.tokens.train for array in stream.arrays]
        buckets = frequency_buckets(texts, self.tokens.vocabulary_size).to(device)
        return lambda: evaluate(
            self.model, batches, buckets, device=device, precision=config.precision, parallel=self.parallel
        )


def run_steps(run: Training) -> None:
    """Train from the last checkpoint, or from the start, to the last step.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the current step is done and in a checkpoint.
    """
    config, parallel, model, optimizer = run.config, run.parallel, run.model, run.optimizer
    steps = config.steps
    batches, evaluate_now = run.batches(), run.evaluator()
    evaluate_after = evaluation_steps(steps, config.evaluation.times)
    peaks = [group["lr"] for group in optimizer.param_groups]
    saved = Checkpoints(run.folder.checkpoints, config, run.tokens.key, run.machine, parallel)
    state = saved.load_latest()
    start = restore(state, model=model, optimizer=optimizer, parallel=parallel) if state else 0
    measured = (state or {}).get("monitor")
    del state
    model.train()
    clock = Clock(run.device)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(told=parallel.is_first))
        log, file, tell = None, None, [run.on_measure] if run.on_measure is not None else []
        if parallel.is_first:
            log = stack.enter_context(RunLog(run.folder.log_file, resume_step=start, config=config))
            file, tell = run.folder.monitor_file, [log.write_measurement, *tell]
        run_monitor = None
        if config.measured_every:
            run_monitor = RunMonitor(config, model, optimizer, clock, start=start, state=measured, file=file, tell=tell)
            stack.enter_context(run_monitor.monitor)
        stream = stack.enter_context(
            prefetch(batches, range(start, steps), accumulate=config.accumulate, device=run.device)
        )
        listeners = [log.write, *([run.on_step] if run.on_step is not None else [])] if log is not None else []
        records = StepRecorder(run.device, listeners, parallel=parallel)
        for step, micro_batches in enumerate(stream, start=start):
            factor = learning_rate_factor(step, config)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            parallel.seed(config.seed, step)
            loss, norm = take_step(run, micro_batches, clock)
            record: dict[str, Any] = {
                "step": step + 1,
                "tokens": (step + 1) * config.tokens_per_step,
                "loss": None,  # not known yet, but first in the log
                "lr": (config.optimizer.lr or 0.0) * factor,
                "grad_norm": None,
            }
            clock.lap("rest_ms")
            if step + 1 in evaluate_after:
                evaluation = evaluate_now()
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
                measured = run_monitor.state_dict() if run_monitor is not None else None
                if log is not None:
                    log.sync()
                saved.save(step + 1, model, optimizer, measured)
                clock.lap("checkpoint_ms")
            if stopped_by is not None:
                raise Interrupted(stopped_by, f" after step {step + 1} of {steps}")


def take_step(run: Training, micro_batches: MicroBatches, clock: Clock) -> tuple[Tensor, Tensor]:
    """Update the weights on one batch; returns its loss and the gradient's norm before the clip."""
    clock.lap("rest_ms")
    loss = forward_backward(run.module, micro_batches, run.config.precision)
    clock.lap("forward_backward_ms")
    bound = run.config.optimizer.gradient_clip
    if bound and isinstance(run.optimizer, SpectralOptimizer):
        # As the authors of pre-clipping do: the global norm is that of pre-clipped gradients.
        run.optimizer.pre_clip_()
        clock.lap("optimizer_ms")
    norm = clip_gradient(run.model, bound)
    clock.lap("gradient_clip_ms")
    run.optimizer.step()
    clock.lap("optimizer_ms")
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def forward_backward(model: nn.Module, micro_batches: MicroBatches, precision: str) -> Tensor:
    """Add the gradient of the mean loss over micro-batches of equal size; returns that loss."""
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
    """The context of a micro-batch: replicas exchange gradients only after the last one."""
    inner = getattr(module, "_orig_mod", module)  # the module inside a compiled one
    return inner.no_sync() if more and isinstance(inner, DistributedDataParallel) else nullcontext()


def clip_gradient(model: nn.Module, bound: float) -> Tensor:
    """Scale the gradient down to the bound on its global norm, and return the norm before; a bound of 0 only measures.

    The norm spans all shards. torch's functions take either sharded or whole tensors; a model may hold both.
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
