"""Settings of ``spectrim spectrum``. Imports no torch, so that ``--help`` answers at once."""

from typing import Self

from pydantic import Field, model_validator

from spectrim.lab.config import DataConfig
from spectrim.lab.settings import Config, Count, PositiveFloat, PositiveInt, Seed, unset

__all__ = ["SpectrumConfig", "TextConfig"]

OWN = "the run's own"


class TextConfig(Config):
    """Text for the gradients, where it differs from the run's own."""

    sources: tuple[str, ...] = Field(default=(), json_schema_extra={"default": OWN})
    """Text, jsonl or parquet (a file, folder or glob), a folder of token shards, or hub:OWNER/NAME. The weight is the
    source's share of the tokens."""
    text_column: str | None = unset(OWN)
    """Column of jsonl, parquet and data sets that holds the text."""
    tokenizer: str | None = unset(OWN)
    """A tokenizer.json or a Hugging Face folder."""
    batch_size: PositiveInt | None = unset(OWN)
    """Sequences in a batch."""
    sequence_length: PositiveInt | None = unset(OWN)
    """Tokens in a sequence."""

    def over(self, data: DataConfig) -> DataConfig:
        """The settings ``data``, replaced by those that are set here."""
        given = {key: value for key, value in self if value is not None and value != ()}
        return data.model_copy(update=given)


class SpectrumConfig(Config):
    """The matrices and the gradients to measure."""

    batches: Count = 32
    """Batches for the mean and the noise of the gradient, at least 4; 0 measures weights alone."""
    layers: tuple[Count, ...] = Field(default=(), json_schema_extra={"default": "the first, a middle and the last"})
    """Layers to measure."""
    parameters: tuple[str, ...] = Field(default=(), json_schema_extra={"default": "all of the layers"})
    """Matrices to measure, by a pattern of their names such as '*.q_proj.weight'."""
    thresholds: tuple[PositiveFloat, ...] = Field(default=(), json_schema_extra={"default": "none"})
    """Also show the gradient after spectral soft clipping at this threshold c."""
    seed: Seed | None = unset("the batches that would have come next in the run")
    """Chooses the batches."""
    memory: PositiveFloat = 2.0
    """Gigabytes of gradients held at once; the rest is measured in further passes."""
    data: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _one_choice_of_matrices(self) -> Self:
        if self.layers and self.parameters:
            raise ValueError("--layers and --parameters both say which matrices; give one of them")
        return self
