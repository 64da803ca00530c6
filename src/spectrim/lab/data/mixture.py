"""Groups of sources, one for each token stream, and the tokenizer that they share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectrim.lab.config import DataConfig
from spectrim.lab.data.batches import BLOCK
from spectrim.lab.data.documents import Document, read_addresses
from spectrim.lab.data.shards import Shards, open_shards
from spectrim.lab.data.sources import Source, parse_sources, read_sources
from spectrim.lab.data.tokenizer import Tokenizer, load_tokenizer
from spectrim.lab.errors import LabError

__all__ = ["SourceGroup", "choose_tokenizer", "group_sources"]


@dataclass(frozen=True, kw_only=True)
class SourceGroup:
    """The sources of one token stream: a weighted one, or all of those without weights."""

    name: str
    weight: float
    texts: tuple[Source, ...]
    """The sources that hold text, not tokens."""
    shards: tuple[Shards, ...]
    default: bool = False
    """True if the text is the default corpus."""

    @property
    def has_text(self) -> bool:
        """True if there is text to encode."""
        return self.default or bool(self.texts)

    def documents(self, text_column: str) -> Iterator[Document]:
        """Every document of the group, read anew."""
        return read_addresses() if self.default else read_sources(self.texts, text_column)


def group_sources(config: DataConfig) -> list[SourceGroup]:
    """One group for each weighted source; a single group if there are no weights.

    Raises:
        LabError: a source's weight is too small to count, or a shard folder cannot be opened.
    """
    sources = parse_sources(config.sources)
    if not sources:
        return [SourceGroup(name="'sotu'", weight=1.0, texts=(), shards=(), default=True)]
    weighted = sources[0].weight is not None
    parts = [[source] for source in sources] if weighted else [sources]
    total = sum(source.weight or 0.0 for source in sources)
    for source in sources:
        if source.weight is not None and source.weight < total / BLOCK:
            raise LabError(f"data {str(source)!r}: the weight is below a thousandth of the sum {total:g}")
    return [
        SourceGroup(
            name=", ".join(repr(source.location) for source in part),
            weight=part[0].weight or 1.0,
            texts=tuple(source for source in part if not source.is_shards),
            shards=tuple(
                open_shards(Path(source.location), config.validation_fraction) for source in part if source.is_shards
            ),
        )
        for part in parts
    ]


def choose_tokenizer(config: DataConfig, groups: Sequence[SourceGroup]) -> Tokenizer | None:
    """The user's own tokenizer, or that of a shard folder; None if one must be learned or there is none.

    Raises:
        LabError: shards were made with another vocabulary than the tokenizer's.
    """
    shards = [shards for group in groups for shards in group.shards]
    name = config.tokenizer or next((str(each.tokenizer) for each in shards if each.tokenizer), None)
    tokenizer = load_tokenizer(name, config.end_of_document) if name else None
    if tokenizer and config.vocabulary_size not in (None, tokenizer.vocabulary_size):
        raise LabError(
            f"vocabulary_size={config.vocabulary_size}, but tokenizer {name!r} has {tokenizer.vocabulary_size} tokens"
        )
    if shards and tokenizer is None and any(group.has_text for group in groups):
        raise LabError(
            f"data {groups[0].name}: text beside token shards needs the --tokenizer that they were made with"
        )
    for each in shards:
        for whose, size in (
            (f"tokenizer {name!r}", tokenizer and tokenizer.vocabulary_size),
            ("another folder", shards[0].vocabulary_size),
        ):
            if size is not None and each.vocabulary_size != size:
                raise LabError(
                    f"data {each.folder}: its shards have vocabulary_size {each.vocabulary_size}, {whose} has {size}"
                )
    return tokenizer
