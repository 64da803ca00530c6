"""Reads the sources that ``--data`` names, one document at a time.

    notes.txt, books/, 'web/*.jsonl.gz'    text, Markdown, jsonl and parquet: a file, a folder, a glob
    hub:OWNER/NAME[:CONFIG[:SPLIT]]        a data set of the Hugging Face hub, by the package ``datasets``
    FOLDER                                 one that ``save_to_disk`` of ``datasets`` wrote, or token shards
    any of them followed by @WEIGHT        its share in every batch, see :mod:`spectrim.lab.data.batches`

A text file is a document, and so is a row of the other formats.
"""

import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.lab.data.documents import Document
from spectrim.lab.data.shards import is_shard_folder
from spectrim.lab.data.source_files import find_files, suffix
from spectrim.lab.errors import LabError
from spectrim.lab.files import parse_json
from spectrim.lab.paths import named_path
from spectrim.lab.settings import is_text

__all__ = ["Source", "parse_sources", "read_sources", "resolve_sources"]

HUB = "hub:"
LONG_TEXT = 2**24
"""A text file with more characters is read as several documents of :data:`PART` characters."""
PART = 2**20


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of data: its place, and its weight in the mixture, if any."""

    location: str
    weight: float | None = None

    def __str__(self) -> str:
        return self.location if self.weight is None else f"{self.location}@{self.weight:g}"

    @property
    def is_shards(self) -> bool:
        """True for a folder of tokens instead of text."""
        return not self.is_hub and is_shard_folder(Path(self.location))

    @property
    def is_hub(self) -> bool:
        """True if the package ``datasets`` fetches it."""
        return self.location.startswith(HUB)


def parse_sources(sources: Sequence[str]) -> list[Source]:
    """Read every source, its location made absolute.

    Raises:
        LabError: a weight is not positive, or some sources have one and some have none.
    """
    parsed = [parse_source(source) for source in sources]
    bare = [source.location for source in parsed if source.weight is None]
    if bare and len(bare) < len(parsed):
        raise LabError(f"data {bare[0]!r} has no weight, but others have; give every source @WEIGHT, or none")
    return parsed


def resolve_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """The sources with absolute paths, so that a stored configuration means the same from any folder.

    Raises:
        LabError: as :func:`parse_sources`, or a source needs a package that is not installed.
    """
    parsed = parse_sources(sources)
    if any(source.is_hub for source in parsed):
        # Import this before transformers, whose import disables the network for the hub's client.
        import_datasets(next(source.location for source in parsed if source.is_hub))
    return tuple(map(str, parsed))


def parse_source(text: str) -> Source:
    location, weight = text, None
    # A file's own name may end in @WEIGHT.
    is_path, place = not text.startswith(HUB), f"data {text!r}"
    exists = is_path and named_path(text, place).exists()
    if not exists and (match := re.fullmatch(r"(.+)@([-+.\w]+)", text, re.DOTALL)):
        try:
            location, weight = match[1], float(match[2])
        except ValueError:
            pass  # "@" is a part of the name
        else:
            if not 0 < weight < float("inf"):
                raise LabError(f"data {text!r}: weight {match[2]} is not a positive number")
    if is_path:
        location = str(named_path(location, place))
    return Source(location=location, weight=weight)


def read_sources(sources: Iterable[Source], text_column: str) -> Iterator[Document]:
    """Yield every document that has text, in a fixed order; a file that two sources match is read once.

    Raises:
        LabError: a source matches nothing, or cannot be read; the message names the file, and line and column in it.
    """
    seen: set[Path] = set()
    for source in sources:
        for document in read_source(source, text_column, seen):
            if document.text.strip():
                yield document


def read_source(source: Source, text_column: str, seen: set[Path]) -> Iterator[Document]:
    if source.is_hub or is_saved_data_set(Path(source.location)):
        yield from read_data_set(source.location, text_column)
        return
    for file in find_files(source.location):
        if file in seen:
            continue
        seen.add(file)
        try:
            yield from read_file(file, text_column)
        except UnicodeDecodeError as error:
            raise LabError(f"data {str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LabError(f"data {str(file)!r} is not a whole gzip file: {error}") from None
        except OSError as error:
            raise LabError(f"data {str(file)!r}: {error.strerror or error}") from None


def read_file(path: Path, text_column: str) -> Iterator[Document]:
    if suffix(path) in (".jsonl", ".ndjson", ".json"):
        return read_lines(path, text_column)
    if suffix(path) == ".parquet":
        return read_parquet(path, text_column)
    return read_text(path)


def open_file(path: Path) -> Any:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def read_text(path: Path) -> Iterator[Document]:
    """The file as one document, or cut at line ends into several if it is too long for memory."""
    with io.TextIOWrapper(open_file(path), encoding="utf-8") as file:
        text = file.read(LONG_TEXT)
        if len(text) < LONG_TEXT:
            yield Document(name=str(path), text=text)
            return
        part, end = 0, 0
        while text:
            # A long line is cut anywhere, so that memory stays bounded.
            end = min(len(text), PART)
            end = text.find("\n", end, end + PART) + 1 or end
            yield Document(name=f"{path} (part {part})", text=text[:end])
            part, text = part + 1, text[end:]
            if len(text) < 2 * PART:
                text += file.read(LONG_TEXT)


def read_lines(path: Path, column: str) -> Iterator[Document]:
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"data {str(path)!r}, line {number}"
            record = parse_json(line, place)
            if not isinstance(record, dict):
                raise LabError(f"{place}: expected an object with the key {column!r}, found {type(record).__name__}")
            yield row(f"{path}:{number}", place, record, column)


def read_parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise LabError(f"data {str(path)!r} needs the package 'pyarrow': pip install 'spectrim[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            check_column(f"data {str(path)!r}", column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield row(f"{path}:{number}", f"data {str(path)!r}, row {number}", {column: text}, column)
    except pyarrow.ArrowException as error:
        raise LabError(f"data {str(path)!r} is not a parquet file: {str(error).splitlines()[0]}") from None


def is_saved_data_set(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def import_datasets(location: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise LabError(f"data {location!r} needs the package 'datasets': pip install 'spectrim[data]'") from None
    return datasets


def read_data_set(location: str, column: str) -> Iterator[Document]:
    """The rows of a data set that ``datasets`` downloads, or has saved; its files are memory-mapped."""
    datasets = import_datasets(location)
    split = "train"
    try:
        if location.startswith(HUB):
            name, configuration, given = [*location.removeprefix(HUB).split(":", 2), "", ""][:3]
            split = given or split
            data = datasets.load_dataset(name, configuration or None, split=split)
        else:
            data = datasets.load_from_disk(location)
    except Exception as error:
        # The package raises any error of its format readers and of the network.
        raise LabError(f"data {location!r}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if isinstance(data, dict):
        if split not in data:
            raise LabError(f"data {location!r} has no split {split!r}, expected one of {', '.join(data)}")
        data = data[split]
    if names := getattr(data, "column_names", None):
        check_column(f"data {location!r}", column, names)
        data = data.select_columns([column])
    rows = iter(data)
    for number in itertools.count(1):
        try:
            record = next(rows, None)
        except Exception as error:  # as above: a damaged file fails while it is read
            raise LabError(f"data {location!r}, row {number}: {' '.join(str(error).split())}") from error
        if record is None:
            return
        yield row(f"{location}:{number}", f"data {location!r}, row {number}", record, column)


def check_column(place: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise LabError(f"{place} has no column {column!r}, expected one of {', '.join(names)} as --text-column")


def row(name: str, place: str, record: dict[str, Any], column: str) -> Document:
    """The text of a row; null is no text."""
    check_column(place, column, list(record))
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise LabError(f"{place}: column {column!r} holds {type(text).__name__}, expected text")
    if text and not is_text(text):
        raise LabError(f"{place}: column {column!r} holds half of a surrogate pair, which is no text in UTF-8")
    return Document(name=name, text=text or "")
