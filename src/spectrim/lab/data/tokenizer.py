"""Tokenizers: a byte-level BPE learned from the training documents, or the user's own. Text that spells a special token
is encoded as text.
"""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.lab.errors import LabError
from spectrim.lab.paths import named_path

__all__ = ["END_OF_DOCUMENT", "Tokenizer", "learn_tokenizer", "load_tokenizer", "open_learned", "resolve_tokenizer"]

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""Special tokens that may end a document; the first that the tokenizer has is taken."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Encodes text; also knows the vocabulary size and the end of a document."""

    backend: Any
    """A ``tokenizers.Tokenizer``."""
    vocabulary_size: int
    """One more than the largest token."""
    end_of_document: str
    path: Path | None = None
    """The user's own file or folder."""

    @property
    def end(self) -> int:
        """The token of :attr:`end_of_document`."""
        return int(self.backend.token_to_id(self.end_of_document))

    @property
    def digest(self) -> str:
        """Equal digests, equal tokens."""
        return hashlib.sha256(f"{self.end_of_document}\n{self.backend.to_str()}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, followed by the end of the document."""
        self.backend.encode_special_tokens = True
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*encoding.ids, self.end] for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens; ends of documents are spelled out."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, or a copy of the user's own Hugging Face tokenizer as ``tokenizer/``."""
        if self.path is not None and self.path.is_dir():
            load_pretrained(self.path).save_pretrained(folder / "tokenizer")
        elif self.path is not None:
            shutil.copyfile(self.path, folder / "tokenizer.json")
        else:
            self.backend.save(str(folder / "tokenizer.json"))


def learn_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Learn a byte-level BPE from texts. Short texts give fewer tokens than asked for."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend=backend, vocabulary_size=backend.get_vocab_size(), end_of_document=END_OF_DOCUMENT)


def open_learned(file: Path) -> Tokenizer:
    """Load a tokenizer that :func:`learn_tokenizer` has made."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(file))
    return Tokenizer(backend=backend, vocabulary_size=backend.get_vocab_size(), end_of_document=END_OF_DOCUMENT)


def resolve_tokenizer(name: str) -> str:
    """The absolute path of a tokenizer.

    Raises:
        LabError: there is no such file or folder.
    """
    path = named_path(name, f"tokenizer {name!r}")
    if not (path.is_file() or path.is_dir()):
        raise LabError(
            f"tokenizer {name!r}: no such file or folder, expected a tokenizer.json or a Hugging Face folder"
        )
    return str(path)


def load_tokenizer(name: str, end_of_document: str | None = None) -> Tokenizer:
    """The user's own tokenizer.

    Args:
        name: a ``tokenizer.json``, or a Hugging Face folder that holds a tokenizer.
        end_of_document: the token after each document; unset, the folder's end-of-sequence token or one of
            :data:`KNOWN_ENDS`.

    Raises:
        LabError: it cannot be read, or has no such token.
    """
    path = Path(resolve_tokenizer(name))
    known: tuple[str, ...] = KNOWN_ENDS
    if path.is_dir():
        pretrained = load_pretrained(path)
        backend = pretrained.backend_tokenizer
        known = (pretrained.eos_token, *known) if pretrained.eos_token else known
    else:
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            # The package raises a bare Exception.
            raise LabError(f"tokenizer {name!r} is not a tokenizer.json: {error}") from None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    known = (end_of_document,) if end_of_document is not None else known
    found = next((token for token in known if token in vocabulary), None)
    if found is None:
        special = sorted(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
        wanted = f"no token {end_of_document!r}" if end_of_document else "no end of a document that the lab knows"
        raise LabError(
            f"tokenizer {name!r} has {wanted}; name one as end_of_document in [data], its special tokens are "
            f"{', '.join(special) or 'none'}"
        )
    return Tokenizer(backend=backend, vocabulary_size=max(vocabulary.values()) + 1, end_of_document=found, path=path)


def load_pretrained(folder: Path) -> Any:
    from spectrim.lab.huggingface import quiet_transformers

    transformers = quiet_transformers()
    try:
        pretrained = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The readers of the many formats raise many kinds of errors.
        raise LabError(f"tokenizer {str(folder)!r} cannot be read: {' '.join(str(error).split())}") from None
    if not pretrained.is_fast:
        raise LabError(f"tokenizer {str(folder)!r} has no tokenizer.json and cannot be converted to one")
    return pretrained
