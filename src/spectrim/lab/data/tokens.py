"""Tokens: a corpus as memory-mapped streams, one for each weighted source, or one for all."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spectrim.lab.config import DEFAULT_VOCABULARY_SIZE, DataConfig
from spectrim.lab.data.mixture import SourceGroup, choose_tokenizer, group_sources
from spectrim.lab.data.shards import Shards
from spectrim.lab.data.sources import parse_sources, resolve_sources
from spectrim.lab.data.streams import TokenArray, TokenStream
from spectrim.lab.data.token_cache import SIDES, array_name, cached_corpus
from spectrim.lab.data.tokenizer import Tokenizer, open_learned, resolve_tokenizer
from spectrim.lab.errors import LabError, LabWarning

__all__ = ["Tokens", "default_cache_dir", "describe_tokens", "prepare_tokens", "resolve_data"]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenized corpus: a stream for each weighted source, or one for all."""

    key: str
    """Hash of content and settings; equal keys mean equal tokens."""
    train: tuple[TokenStream, ...]
    validation: tuple[TokenStream, ...]
    vocabulary_size: int
    end_of_document: str | None
    """None for token shards without a tokenizer."""
    end: int | None
    """Its token."""
    tokenizer: Path | None
    """A tokenizer.json, or a Hugging Face folder."""
    learned: bool
    """True if the lab learned the tokenizer; a short text gives a smaller vocabulary than asked for."""
    padded: bool
    """True if the model's embedding may have more rows than the tokenizer has tokens."""
    statistics: dict[str, Any]
    """Documents, bytes and tokens of each side; documents and bytes of token shards are not known."""


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/spectrim, or ~/.cache/spectrim."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrim"


def resolve_data(data: DataConfig, *, weights: str | None = None) -> DataConfig:
    """Check the data settings without reading the data, and fill in absolute paths, tokenizer and vocabulary size.

    Args:
        data: what to read.
        weights: a folder to continue from, whose tokenizer is the default.

    Raises:
        LabError: two settings contradict each other, or a package is missing.
    """
    sources = parse_sources(data.sources)
    update: dict[str, Any] = {"sources": resolve_sources(data.sources)}
    tokenizer = data.tokenizer
    if tokenizer is None and weights is not None and any(Path(weights).glob("tokenizer*")):
        tokenizer = weights
    if tokenizer is not None:
        update["tokenizer"] = resolve_tokenizer(tokenizer)
        if data.vocabulary_size is not None:
            raise LabError(
                f"vocabulary_size={data.vocabulary_size}: tokenizer {tokenizer!r} has its own, leave one of them out"
            )
    elif not any(source.is_shards for source in sources):
        update["vocabulary_size"] = data.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    return data.model_copy(update=update)


def prepare_tokens(config: DataConfig, cache_dir: Path | None = None) -> Tokens:
    """Read, split and tokenize the corpus, or open its cache.

    Raises:
        LabError: the corpus cannot be read, sources do not go together, or either side is shorter than a sequence.
    """
    groups = group_sources(config)
    tokenizer = choose_tokenizer(config, groups)
    cache = (cache_dir or default_cache_dir()) / "tokens"
    folder = cached_corpus(config, groups, tokenizer, cache) if any(group.has_text for group in groups) else None
    tokens = open_tokens(config, groups, tokenizer, folder)
    for side, streams in (("training", tokens.train), ("validation", tokens.validation)):
        for group, stream in zip(groups, streams, strict=True):
            if not stream.windows(config.sequence_length):
                raise LabError(
                    f"data {group.name}: the {side} text has {len(stream)} tokens, one sequence needs "
                    f"{config.sequence_length + 1}; give more text or a shorter sequence_length"
                )
    if tokens.learned and tokens.padded:
        tell_size(config.vocabulary_size or DEFAULT_VOCABULARY_SIZE, tokens.vocabulary_size)
    return tokens


@cache
def tell_size(asked: int, became: int) -> None:
    """Warn once that a text gives fewer tokens than were asked for."""
    if os.environ.get("RANK", "0") == "0":
        message = f"vocabulary_size={asked}: the text gives {became} tokens, and the vocabulary has no more"
        warnings.warn(message, LabWarning, stacklevel=2)


def open_tokens(
    config: DataConfig, groups: Sequence[SourceGroup], tokenizer: Tokenizer | None, folder: Path | None
) -> Tokens:
    stored = json.loads((folder / "statistics.json").read_text(encoding="utf-8")) if folder else None
    streams: dict[str, list[TokenStream]] = {side: [] for side in SIDES}
    parts: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        counts = stored.get("groups", [stored])[index] if stored else None
        part: dict[str, Any] = {"source": group.name, "weight": group.weight}
        for side in SIDES:
            arrays: list[TokenArray] = [array for shards in group.shards for array in getattr(shards, side)]
            if counts and folder:
                arrays.append(np.load(folder / array_name(side, index, len(groups)), mmap_mode="r"))
            size = min((shards.vocabulary_size for shards in group.shards), default=None)
            stream = TokenStream(arrays, weight=group.weight, vocabulary_size=size, name=group.name)
            streams[side].append(stream)
            known = counts[side] if counts and not group.shards else {"documents": None, "bytes": None}
            part[side] = {**known, "tokens": len(stream)}
        parts.append(part)
    shards = [shards for group in groups for shards in group.shards]
    statistics: dict[str, Any] = {side: parts[0][side] for side in SIDES} if len(parts) == 1 else total(parts)
    learned, asked = tokenizer is None and folder is not None, config.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    path: Path | None
    if folder is not None:
        path = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder / "tokenizer.json"
        tokenizer = tokenizer or open_learned(path)
    else:
        path = tokenizer.path if tokenizer else None
    return Tokens(
        key=data_key(folder, shards, config),
        train=tuple(streams["train"]),
        validation=tuple(streams["validation"]),
        vocabulary_size=max(
            [each.vocabulary_size for each in shards] + ([tokenizer.vocabulary_size] if tokenizer else [])
        ),
        end_of_document=tokenizer.end_of_document if tokenizer else None,
        end=tokenizer.end if tokenizer else shards[0].end_of_document,
        tokenizer=path,
        learned=learned,
        padded=not learned or (tokenizer is not None and tokenizer.vocabulary_size < asked),
        statistics=statistics,
    )


def data_key(folder: Path | None, shards: Sequence[Shards], config: DataConfig) -> str:
    if not shards and folder is not None:
        return folder.name
    values = [folder.name if folder else None, [each.digest for each in shards], config.validation_fraction]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all sources together, and each source's own."""
    sums: dict[str, Any] = {}
    for side in SIDES:
        counts = {key: [part[side][key] for part in parts] for key in ("documents", "bytes", "tokens")}
        sums[side] = {key: None if None in values else sum(values) for key, values in counts.items()}
    return {**sums, "sources": list(parts)}


def describe_tokens(tokens: Tokens, sample_tokens: int = 100) -> dict[str, Any]:
    """Documents, bytes and tokens of both sides of the split, and the beginning of the training text."""
    first = tokens.train[0].arrays[0][:sample_tokens].tolist()
    if tokens.tokenizer is None:
        sample = " ".join(map(str, first))
    else:
        file = tokens.tokenizer / "tokenizer.json" if tokens.tokenizer.is_dir() else tokens.tokenizer
        sample = open_learned(file).decode(first)
    return {"key": tokens.key, "vocabulary_size": tokens.vocabulary_size, **tokens.statistics, "sample": sample}
