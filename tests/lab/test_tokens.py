from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from spectrim.lab import tokens as module
from spectrim.lab.batches import Batches, validation_batches
from spectrim.lab.config import DataConfig
from spectrim.lab.corpus import read_documents, split_documents
from spectrim.lab.errors import LabError
from spectrim.lab.tokens import END_OF_DOCUMENT, describe_tokens, prepare_tokens


@pytest.fixture
def data(text_folder: Path) -> DataConfig:
    return DataConfig(sources=(str(text_folder),), vocabulary_size=300, sequence_length=16)


def test_tokens_decode_to_the_documents_with_an_end_after_each(data: DataConfig, cache_dir: Path) -> None:
    tokens = prepare_tokens(data, cache_dir)
    split = split_documents(read_documents(data.sources), data.validation_fraction)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokens.tokenizer_file))
    for side, array in ((split.train, tokens.train), (split.validation, tokens.validation)):
        expected = "".join(document.text + END_OF_DOCUMENT for document in side)
        assert tokenizer.decode(array.tolist(), skip_special_tokens=False) == expected
    assert int(tokens.train.max()) < 300
    assert tokens.statistics["train"]["documents"] + tokens.statistics["validation"]["documents"] == 8


def test_text_that_spells_the_end_of_document_token_stays_text(tmp_path: Path, cache_dir: Path) -> None:
    text = f"before {END_OF_DOCUMENT} after, and some more words here\n" * 20
    (tmp_path / "a.txt").write_text(text)
    data = DataConfig(
        sources=(str(tmp_path / "a.txt"),), vocabulary_size=300, sequence_length=4, validation_fraction=0.3
    )
    tokens = prepare_tokens(data, cache_dir)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokens.tokenizer_file))
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    assert Counter(tokens.train.tolist())[end] == 1


def test_the_cache_is_used_again_for_equal_content_under_another_name(
    data: DataConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_tokens(data, cache_dir)
    copies = tmp_path / "copies"
    copies.mkdir()
    for file in Path(data.sources[0]).iterdir():
        (copies / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(module, "build_cache", lambda *_: pytest.fail("tokenized again"))
    assert prepare_tokens(data.model_copy(update={"sources": (str(copies),)}), cache_dir).key == first.key


def test_the_cache_key_changes_with_content_and_settings(data: DataConfig, tmp_path: Path, cache_dir: Path) -> None:
    key = prepare_tokens(data, cache_dir).key
    (tmp_path / "more.txt").write_text("one more document " * 100)
    more = data.model_copy(update={"sources": (*data.sources, str(tmp_path / "more.txt"))})
    assert prepare_tokens(more, cache_dir).key != key
    assert prepare_tokens(data.model_copy(update={"vocabulary_size": 301}), cache_dir).key != key
    assert prepare_tokens(data.model_copy(update={"validation_fraction": 0.4}), cache_dir).key != key
    # How tokens are cut into batches does not change them.
    assert prepare_tokens(data.model_copy(update={"batch_size": 3, "sequence_length": 8}), cache_dir).key == key


def test_a_failure_leaves_no_half_made_cache(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "encode", fail)
    with pytest.raises(OSError, match="No space"):
        prepare_tokens(data, tmp_path)
    assert not any((tmp_path / "tokens").iterdir())


def test_text_shorter_than_a_sequence_is_refused_with_both_lengths(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(LabError, match=r"short\.txt.* tokens, one sequence needs 129"):
        prepare_tokens(DataConfig(sources=(str(tmp_path / "short.txt"),)), cache_dir)


def windows_of(batches: Batches, steps: range) -> list[int]:
    """The first token of every sequence; with tokens 0, 1, 2, … that is where it starts."""
    return [int(start) for step in steps for start in batches(step)[0][:, 0]]


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    settings = {"batch_size": 4, "sequence_length": 10}
    forwards, backwards = Batches(stream, seed=1, **settings), Batches(stream, seed=1, **settings)
    first = [forwards(step) for step in range(60)]
    for step in reversed(range(60)):
        assert torch.equal(backwards(step)[0], first[step][0])
    other = Batches(stream, seed=2, **settings)
    assert any(not torch.equal(other(step)[0], first[step][0]) for step in range(3))
    inputs, targets = first[0]
    assert torch.equal(inputs + 1, targets)


def test_an_epoch_visits_every_window_once_and_epochs_differ() -> None:
    # 33 windows in batches of 4: batches straddle epochs.
    batches = Batches(np.arange(331, dtype=np.uint16), seed=0, batch_size=4, sequence_length=10)
    starts = windows_of(batches, range(33))
    epochs = [starts[index : index + 33] for index in range(0, 132, 33)]
    for epoch in epochs:
        assert sorted(epoch) == [10 * window for window in range(33)]
    assert epochs[0] != epochs[1]


def test_the_validation_set_spreads_over_the_text_and_takes_what_there_is() -> None:
    stream = np.arange(1001, dtype=np.uint16)
    some = list(validation_batches(stream, batches=2, batch_size=5, sequence_length=10))
    assert [len(inputs) for inputs, _ in some] == [5, 5]
    assert [int(start) for inputs, _ in some for start in inputs[:, 0]] == list(range(0, 1000, 100))
    everything = list(validation_batches(stream, batches=50, batch_size=8, sequence_length=10))
    assert sum(len(inputs) for inputs, _ in everything) == 100


def test_a_description_counts_and_samples(data: DataConfig, cache_dir: Path) -> None:
    description = describe_tokens(prepare_tokens(data, cache_dir))
    assert description["sample"].split()[0].isalpha()
    assert description["train"]["tokens"] > description["validation"]["tokens"] > 0
