"""The cache of tokens: text is encoded once, into a folder that is either complete or absent.

Documents are read one at a time, in two or three passes (survey, learning of the tokenizer, encoding), so that a corpus
may be larger than memory. A cache folder is named by a hash of the content and of every setting that shapes the tokens,
is filled under a temporary name and renamed when complete, so that two processes may make it at once.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectrim.lab.config import DEFAULT_VOCABULARY_SIZE, DataConfig
from spectrim.lab.data.documents import CorpusSplit, Document, Side, Survey, split_corpus, survey
from spectrim.lab.data.mixture import SourceGroup
from spectrim.lab.data.source_files import find_files
from spectrim.lab.data.sources import is_saved_data_set
from spectrim.lab.data.streams import ArrayWriter, token_dtype
from spectrim.lab.data.tokenizer import Tokenizer, learn_tokenizer
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.files import PARTIAL, checksum, parse_json, sync_directory, write_json, write_text

__all__ = ["SIDES", "array_name", "cache_key", "cache_settings", "cached_corpus"]

FORMAT = 1
"""Version of the cache; it goes up whenever the same text and settings would give other tokens."""

SAMPLE = 2**27
"""About the most characters that a tokenizer learns from; of a larger text, documents are drawn by their hashes."""

BATCH = 2**21
"""Characters that are encoded at a time."""

SAID = 2**25
"""A longer text is announced before it is tokenized."""

LARGE = 2**28
"""Files with more bytes are recognized by name, size and time of change once they are in the cache."""

STATISTICS = "statistics.json"
"""The file of counts, and of the size and checksum of every other file; written last."""

SIDES: tuple[Side, Side] = ("train", "validation")


def cached_corpus(config: DataConfig, groups: Sequence[SourceGroup], tokenizer: Tokenizer | None, cache: Path) -> Path:
    """The cache folder of the text, which is made if it is missing."""
    settings = cache_settings(config, tokenizer)
    shortcut = by_file_times(config, groups, settings)
    pointer = cache / "by-file-times" / shortcut if shortcut else None
    known = cache / pointer.read_text(errors="replace") if pointer and pointer.is_file() else None
    if known is not None and known.parent == cache and damage(known) is None:
        return known
    surveys = []
    for group in groups:
        surveys.append(survey(group.documents(config.text_column) if group.has_text else ()))
        if group.has_text and not surveys[-1].documents:
            raise LabError(f"data {group.name}: empty corpus, no document holds any text")
    splits = split_corpus(surveys, config.validation_fraction)
    folder = cache / cache_key(settings, surveys, splits)
    if (reason := damage(folder)) is not None:
        discard(folder, reason)
        build_cache(folder, config, groups, surveys, splits, tokenizer)
    if pointer:
        write_text(pointer, folder.name)
    return folder


def damage(folder: Path) -> str | None:
    """The reason why a cache folder cannot be used, or None; its content is checked where that is quick."""
    try:
        # Older versions took none.
        sums = parse_json((folder / STATISTICS).read_bytes(), STATISTICS).get("checksums", {})
        for file in folder.glob("*.npy"):
            np.load(file, mmap_mode="r", allow_pickle=False)
        sizes = {name: (folder / name).stat().st_size for name in sums}
        for name, (size, value) in sums.items():
            if sizes[name] != size or (sum(sizes.values()) < LARGE and checksum(folder / name) != value):
                return f"its {name} is damaged"
    except (OSError, LabError, AttributeError, TypeError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def discard(folder: Path, reason: str) -> None:
    """Rename a cache folder, then remove it, so that no process finds half of it."""
    if not folder.exists():
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL))
    folder.rename(aside / folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    warnings.warn(f"cached tokens {str(folder)!r} are made anew: {reason}", LabWarning, stacklevel=2)


def cache_settings(config: DataConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Settings that decide the tokens, apart from the text itself."""
    if tokenizer is not None:
        return {"format": FORMAT, "tokenizer": tokenizer.digest}
    return {"format": FORMAT, "vocabulary_size": config.vocabulary_size or DEFAULT_VOCABULARY_SIZE}


def cache_key(settings: dict[str, Any], surveys: Sequence[Survey], splits: Sequence[CorpusSplit]) -> str:
    """The name of the cache folder."""
    contents = [content_of(each, split) for each, split in zip(surveys, splits, strict=True)]
    values = {**settings, "content": contents[0]} if len(contents) == 1 else {**settings, "contents": contents}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def content_of(each: Survey, split: CorpusSplit) -> Any:
    """The digests of both sides of the split, or, if there are too many, the hash of all and the validation share."""
    if split.cut is not None:
        return [[part.digest for side, part in split.sides(()) if side == wanted] for wanted in SIDES]
    if each.order is None:
        return [each.content, split.validation_fraction]
    held_back = [split.holds_back(digest) for digest in each.order]
    return [[digest for digest, held in zip(each.order, held_back, strict=True) if held == side] for side in (0, 1)]


def by_file_times(config: DataConfig, groups: Sequence[SourceGroup], settings: dict[str, Any]) -> str | None:
    """A key for large data without reading it: paths, sizes and times of change of its files."""
    sources = [[source.location for source in group.texts] for group in groups]
    flat = [location for group in sources for location in group]
    if not flat or any(source.is_hub or is_saved_data_set(Path(source.location)) for g in groups for source in g.texts):
        return None
    stats = [[(str(file), file.stat()) for location in group for file in find_files(location)] for group in sources]
    if sum(stat.st_size for group in stats for _, stat in group) < LARGE:
        return None
    files = [[(name, stat.st_size, stat.st_mtime_ns) for name, stat in group] for group in stats]
    values = [settings, config.text_column, config.validation_fraction, files]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def build_cache(
    folder: Path,
    config: DataConfig,
    groups: Sequence[SourceGroup],
    surveys: Sequence[Survey],
    splits: Sequence[CorpusSplit],
    tokenizer: Tokenizer | None,
) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL))
    except OSError as error:
        raise LabError(f"cache folder {str(folder.parent)!r}: {error.strerror}") from None
    try:
        characters = sum(each.characters for each in surveys)
        if characters >= SAID:
            print(f"tokenizing {characters / 1e6:,.0f} M characters, once: they are cached", file=sys.stderr)
        if tokenizer is None:
            share = SAMPLE / characters
            texts = (
                document.text
                for group, split in zip(groups, splits, strict=True)
                for side, document in split.sides(group.documents(config.text_column))
                if side == "train" and (share >= 1 or int(document.digest[16:32], 16) < share * 2**64)
            )
            tokenizer = learn_tokenizer(texts, config.vocabulary_size or DEFAULT_VOCABULARY_SIZE)
        tokenizer.save(partial)
        statistics: list[dict[Side, dict[str, int]] | None] = []
        for index, (group, split) in enumerate(zip(groups, splits, strict=True)):
            if not group.has_text:
                statistics.append(None)
                continue
            documents = unchanged(group.documents(config.text_column), surveys[index], group.name)
            paths = {side: partial / array_name(side, index, len(groups)) for side in SIDES}
            statistics.append(encode(tokenizer, split.sides(documents), paths))
        made = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        sums = {file.relative_to(partial).as_posix(): (file.stat().st_size, checksum(file)) for file in made}
        counts = statistics[0] if len(groups) == 1 else {"groups": statistics}
        write_json(partial / STATISTICS, {**(counts or {}), "checksums": sums})
        sync_directory(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has made the same folder first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def array_name(side: Side, group: int, groups: int) -> str:
    """The file of a group's tokens."""
    return f"{side}.npy" if groups == 1 else f"{side}-{group}.npy"


def unchanged(documents: Iterable[Document], expected: Survey, name: str) -> Iterator[Document]:
    """The documents, with an error at their end if they are not those of the survey."""
    content = hashlib.sha256()
    for document in documents:
        content.update(document.digest.encode())
        yield document
    if content.hexdigest() != expected.content:
        raise LabError(f"data {name} changed while it was being read")


def encode(
    tokenizer: Tokenizer, documents: Iterable[tuple[Side, Document]], paths: dict[Side, Path]
) -> dict[Side, dict[str, int]]:
    """Write the tokens of each side's documents, with an end after each document, and count them."""
    writers = {side: ArrayWriter(path, token_dtype(tokenizer.vocabulary_size)) for side, path in paths.items()}
    statistics = {side: {"documents": 0, "bytes": 0} for side in paths}

    def write(waiting: list[tuple[Side, Document]]) -> None:
        encoded = tokenizer.encode([document.text for _, document in waiting])
        for (side, document), tokens in zip(waiting, encoded, strict=True):
            writers[side].append(tokens)
            statistics[side]["documents"] += 1
            statistics[side]["bytes"] += len(document.text.encode())

    waiting: list[tuple[Side, Document]] = []
    characters = 0
    for pair in documents:
        waiting.append(pair)
        characters += len(pair[1].text)
        if characters >= BATCH:
            write(waiting)
            waiting, characters = [], 0
    write(waiting)
    for side, writer in writers.items():
        writer.close()
        statistics[side]["tokens"] = writer.count
    return statistics
