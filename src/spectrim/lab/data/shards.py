"""Token shards: a folder of text that another program has tokenized.

    shards.json     {"vocabulary_size": 50257, "end_of_document": 50256, "dtype": "uint16"}
    *.npy           one-dimensional arrays of unsigned integers
    *.bin           the same without a header, in the dtype that shards.json names
    tokenizer.json  or the other files of a Hugging Face tokenizer, if any

Files with "val" or "validation" as a word of their names are for validation. Without such files, the last documents are
for validation: all after the first ``end_of_document`` beyond 1 - validation_fraction of the tokens, at least one.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from spectrim.lab.errors import LabError
from spectrim.lab.files import parse_json
from spectrim.lab.settings import Config

__all__ = ["Shards", "is_shard_folder", "open_shards"]

DESCRIPTION = "shards.json"
EXAMPLE = '{"vocabulary_size": 50257, "end_of_document": 50256, "dtype": "uint16"}'
BLOCK = 2**20
"""Tokens that are searched at a time."""
NOWHERE = -(2**62)
SAMPLES = 64
"""Places at which a shard is sampled for its digest, since reading all of it takes too long."""


class ShardDescription(Config):
    """The content of ``shards.json``."""

    vocabulary_size: int = Field(ge=2)
    end_of_document: int | None = Field(default=None, ge=0)
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The arrays of a shard folder, memory-mapped."""

    folder: str
    train: tuple[npt.NDArray[Any], ...]
    validation: tuple[npt.NDArray[Any], ...]
    vocabulary_size: int
    end_of_document: int | None
    digest: str
    """Hash of sizes and samples of the files."""
    tokenizer: Path | None
    """The folder itself, where it holds a tokenizer."""


def is_shard_folder(path: Path) -> bool:
    """True if a folder is marked as one of token shards."""
    return (path / DESCRIPTION).is_file()


def open_shards(folder: Path, validation_fraction: float) -> Shards:
    """Map the shards of a folder and split them.

    Raises:
        LabError: ``shards.json`` or a shard is not as it should be, or there is no document end to split at.
    """
    description = read_description(folder / DESCRIPTION)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".npy", ".bin") and file.is_file())
    arrays = {file: open_shard(file, description.dtype) for file in files}
    if not arrays:
        raise LabError(f"data {str(folder)!r}: empty data set, {DESCRIPTION} stands there without .npy or .bin files")
    held_back = [file for file in files if re.search(r"(?:^|[^a-z])val(?:idation)?(?:[^a-z]|$)", file.stem.lower())]
    train = [arrays[file] for file in files if file not in held_back]
    validation = [arrays[file] for file in held_back]
    if not validation:
        train, validation = cut(train, str(folder), description.end_of_document, validation_fraction)
    return Shards(
        folder=repr(str(folder)),
        train=tuple(train),
        validation=tuple(validation),
        vocabulary_size=description.vocabulary_size,
        end_of_document=description.end_of_document,
        digest=digest(arrays),
        tokenizer=folder if (folder / "tokenizer.json").is_file() else None,
    )


def read_description(path: Path) -> ShardDescription:
    values = parse_json(path.read_bytes(), f"data {str(path)!r}")
    if not isinstance(values, dict):
        raise LabError(f"data {str(path)!r}: expected an object such as {EXAMPLE}")
    description = ShardDescription.parse(values, source=f"data {str(path)!r}")
    if (description.end_of_document or 0) >= description.vocabulary_size:
        raise LabError(
            f"data {str(path)!r}: end_of_document {description.end_of_document} is not below vocabulary_size "
            f"{description.vocabulary_size}"
        )
    return description


def open_shard(path: Path, dtype: str | None) -> npt.NDArray[Any]:
    if path.suffix == ".bin":
        if dtype not in ("uint16", "uint32"):
            raise LabError(
                f"data {str(path)!r}: {DESCRIPTION} beside it has dtype {dtype!r}, expected uint16 or uint32, "
                f"such as {EXAMPLE}"
            )
        size, width = path.stat().st_size, np.dtype(dtype).itemsize
        if not size or size % width:
            raise LabError(f"data {str(path)!r} has {size} bytes, expected a positive multiple of {width} ({dtype})")
        return np.memmap(path, dtype=dtype, mode="r")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise LabError(f"data {str(path)!r} is not a .npy file: {error}") from None
    if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32) or not len(array):
        raise LabError(
            f"data {str(path)!r} is an array of {array.dtype} of shape {array.shape}, expected some tokens in one "
            "dimension of uint16 or uint32"
        )
    return array


def cut(
    arrays: list[npt.NDArray[Any]], place: str, end_of_document: int | None, validation_fraction: float
) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """Cut after the first document that ends beyond the training share, or else before the last document."""
    if end_of_document is None:
        raise LabError(
            f"data {place!r}: no shard is for validation (such as val.npy), and {DESCRIPTION} names no end_of_document "
            "to cut at"
        )
    starts = [0, *itertools.accumulate(map(len, arrays))]
    total = starts.pop()
    target = int(total * (1 - validation_fraction))
    placed = list(zip(starts, arrays, strict=True))
    behind = (
        start + (document_end(array, max(0, target - start), end_of_document) or total) for start, array in placed
    )
    at = min(behind)
    if at >= total:
        # The last document alone reaches into the validation share; hold back all of it.
        at = max(start + last_document_end(array[: total - 1 - start], end_of_document) for start, array in placed)
    if at <= 0:
        raise LabError(
            f"data {place!r}: no end_of_document {end_of_document} between two documents, so none can be held back; "
            "name a shard val.npy"
        )
    train = [array[: max(0, at - start)] for start, array in placed]
    validation = [array[max(0, at - start) :] for start, array in placed]
    return [array for array in train if len(array)], [array for array in validation if len(array)]


def document_end(array: npt.NDArray[Any], start: int, end_of_document: int) -> int | None:
    """The index after the first end of a document from ``start`` on."""
    for at in range(start, len(array), BLOCK):
        found = np.flatnonzero(array[at : at + BLOCK] == end_of_document)
        if len(found):
            return at + int(found[0]) + 1
    return None


def last_document_end(array: npt.NDArray[Any], end_of_document: int) -> int:
    """The index after the last end of a document; far below zero if there is none."""
    for stop in range(len(array), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        found = np.flatnonzero(array[start:stop] == end_of_document)
        if len(found):
            return start + int(found[-1]) + 1
    return NOWHERE


def digest(arrays: dict[Path, npt.NDArray[Any]]) -> str:
    content = hashlib.sha256()
    for path, array in arrays.items():
        content.update(f"{path.name} {array.dtype} {len(array)}\n".encode())
        for sample in range(SAMPLES):
            at = sample * len(array) // SAMPLES
            content.update(np.ascontiguousarray(array[at : at + 4096]).tobytes())
        content.update(np.ascontiguousarray(array[-4096:]).tobytes())
    return content.hexdigest()
