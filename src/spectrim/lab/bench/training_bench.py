"""The benchmark of the training loop: the lab's against a bare one, and the cost of its parts.

The bare loop has the same model, weights and batches, torch's fused AdamW, and no gradient clip, log or reading of the
loss. The two take turns step by step, so that a busy machine slows both.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.nn import functional

from spectrim.lab.config import DataConfig, EvaluationConfig, MonitorConfig, TrainConfig
from spectrim.lab.data.batches import Batches
from spectrim.lab.data.tokens import Tokens, prepare_tokens
from spectrim.lab.logging.log import StepRecord, read_log
from spectrim.lab.models.build import build_model
from spectrim.lab.training.device import environment
from spectrim.lab.training.evaluate import evaluation_steps
from spectrim.lab.training.run import prepare, train

__all__ = ["TrainingRow", "bench_training"]

WARMING_UP = 2
"""Steps at the start that are not counted: allocators and caches fill."""


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """Measurements: times in milliseconds, medians over steps, but means for evaluation and checkpoint."""

    preset: str
    recipe: str
    steps: int
    tokens_per_step: int
    lab_tokens_per_second: float
    """Without evaluations and checkpoints."""
    bare_tokens_per_second: float
    ratio: float
    forward_backward_ms: float
    optimizer_ms: float
    gradient_clip_ms: float
    batch_ms: float
    """Waiting for the batch, and the learning rate."""
    logging_ms: float
    overhead: float
    """Share of a step outside of model, clip and optimizer: waiting for the batch, schedule and log."""
    evaluation_ms: float
    checkpoint_ms: float
    environment: dict[str, str | int]


class BareLoop:
    """Forward, backward, fused AdamW."""

    def __init__(self, config: TrainConfig, tokens: Tokens, *, compiled: bool) -> None:
        data = config.data
        self._batches = Batches(
            tokens.train, seed=config.seed, batch_size=data.batch_size, sequence_length=data.sequence_length
        )
        model = build_model(
            config.model,
            vocabulary_size=tokens.vocabulary_size,
            sequence_length=data.sequence_length,
            seed=config.seed,
            end_of_document=tokens.end,
            padded=tokens.padded,
        )
        self._model: Any = torch.compile(model, dynamic=False) if compiled else model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr or 1e-3, fused=True)

    def step(self, index: int) -> None:
        """Train on the batch with that index."""
        inputs, targets = self._batches(index)
        logits = self._model(input_ids=inputs).logits
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class TakingTurns:
    """Runs a step of the bare loop after each step of the lab, and times both."""

    def __init__(self, bare: BareLoop) -> None:
        self._bare = bare
        self._lab_began = time.perf_counter()
        self.lab: list[float] = []
        self.bare: list[float] = []

    def __call__(self, record: StepRecord) -> None:
        """Called by the lab with the record of its step."""
        began = time.perf_counter()
        self.lab.append(1000 * (began - self._lab_began))
        self._bare.step(record["step"] - 1)
        self._lab_began = time.perf_counter()
        self.bare.append(1000 * (self._lab_began - began))


def bench_training(
    *,
    preset: str,
    recipe: str,
    steps: int,
    batch_size: int,
    sequence_length: int,
    sources: tuple[str, ...] = (),
    compiled: bool = False,
    cache_dir: Path | None = None,
) -> TrainingRow:
    """Train ``steps`` steps both ways, with an evaluation at the end and a checkpoint half way and at the end.

    Raises:
        LabError: preset or recipe is unknown.
    """
    config = prepare(
        TrainConfig.parse(
            {
                "recipe": recipe,
                "steps": steps,
                "device": "cpu",
                "checkpoint_every": max(1, steps // 2),
                "model": {"preset": preset},
                "data": DataConfig(sources=sources, batch_size=batch_size, sequence_length=sequence_length),
                "evaluation": EvaluationConfig(times=1),
                "monitor": MonitorConfig(every=0),
            },
            source="options",
        )
    )
    tokens = prepare_tokens(config.data, cache_dir)
    turns = TakingTurns(BareLoop(config, tokens, compiled=compiled))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(config, out, cache_dir=cache_dir, on_step=turns, compiled=compiled)
        records = read_log(out / "log.jsonl")
    return row_of(preset, config, records, turns, compiled=compiled)


def row_of(
    preset: str, config: TrainConfig, records: list[dict[str, Any]], turns: TakingTurns, *, compiled: bool
) -> TrainingRow:
    """The measurement, from the lab's log and the times of both loops."""
    counted = slice(min(WARMING_UP, config.steps - 1), None)
    # A record has the times of its own step, but logging and checkpoint of the one before.
    logging = [record.get("logging_ms", 0.0) - bare for record, bare in zip(records[1:], turns.bare, strict=False)]
    apart = [record.get("evaluation_ms", 0.0) + record.get("checkpoint_ms", 0.0) for record in records]
    lab = [time - other for time, other in zip(turns.lab, apart, strict=True)][counted]
    bare = turns.bare[counted]
    column = {key: [record[key] for record in records[counted]] for key in records[0] if key.endswith("_ms")}
    lab_ms, bare_ms = fmean(lab), fmean(bare)
    return TrainingRow(
        preset=preset,
        recipe=config.recipe,
        steps=len(lab),
        tokens_per_step=config.tokens_per_step,
        lab_tokens_per_second=1000 * config.tokens_per_step / lab_ms,
        bare_tokens_per_second=1000 * config.tokens_per_step / bare_ms,
        ratio=bare_ms / lab_ms,
        forward_backward_ms=median(column["forward_backward_ms"]),
        optimizer_ms=median(column["optimizer_ms"]),
        gradient_clip_ms=median(column["gradient_clip_ms"]),
        batch_ms=median(column["rest_ms"]),
        logging_ms=median(logging),
        overhead=(fmean(column["rest_ms"]) + fmean(logging)) / lab_ms,
        evaluation_ms=fmean(record["evaluation_ms"] for record in records if "evaluation_ms" in record),
        checkpoint_ms=fmean(record["checkpoint_ms"] for record in records if "checkpoint_ms" in record),
        environment={**environment("cpu"), "compiled": "yes" if compiled else "no"},
    )


def default_shares(row: TrainingRow) -> dict[str, float]:
    """The parts of a run with the default number of steps, evaluations and checkpoints, as shares of its time."""
    run = TrainConfig(recipe=row.recipe)
    parts = {
        "steps": run.steps * 1000 * row.tokens_per_step / row.lab_tokens_per_second,
        "evaluation": len(evaluation_steps(run.steps, run.evaluation.times)) * row.evaluation_ms,
        "checkpoints": -(-run.steps // run.checkpoint_every) * row.checkpoint_ms,
    }
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def lines(row: TrainingRow) -> list[str]:
    """The measurement in words."""
    step_ms = 1000 * row.tokens_per_step / row.lab_tokens_per_second
    run, shares = TrainConfig(recipe=row.recipe), default_shares(row)
    return [
        f"model {row.preset}, {row.recipe}, {row.tokens_per_step} tokens a step, {row.steps} steps each, "
        f"{row.environment['threads']} threads",
        f"lab        {row.lab_tokens_per_second:8.0f} tokens/s",
        f"bare loop  {row.bare_tokens_per_second:8.0f} tokens/s, torch's fused AdamW, no gradient clip",
        f"ratio      {row.ratio:8.1%}",
        "",
        f"a step of the lab: {step_ms:.1f} ms",
        f"  forward and backward {row.forward_backward_ms:9.2f} ms",
        f"  gradient clip        {row.gradient_clip_ms:9.2f} ms",
        f"  optimizer            {row.optimizer_ms:9.2f} ms, {row.optimizer_ms / step_ms:.1%} of the step",
        f"  batch, schedule      {row.batch_ms:9.2f} ms",
        f"  log                  {row.logging_ms:9.2f} ms",
        f"the lab's own overhead (the last two): {row.overhead:.2%} of a step",
        "",
        f"an evaluation {row.evaluation_ms:.0f} ms, a checkpoint {row.checkpoint_ms:.0f} ms",
        f"of a run of {run.steps} steps with {run.evaluation.times} evaluations and a checkpoint every "
        f"{run.checkpoint_every}: evaluation {shares['evaluation']:.1%}, checkpoints {shares['checkpoints']:.1%}",
    ]
