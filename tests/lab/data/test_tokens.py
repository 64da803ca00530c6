import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from spectrim.lab.config import DataConfig
from spectrim.lab.data import token_cache as module
from spectrim.lab.data import tokenizer
from spectrim.lab.data.documents import Document, split_corpus, survey
from spectrim.lab.data.mixture import group_sources
from spectrim.lab.data.sources import parse_sources, read_sources
from spectrim.lab.data.tokenizer import END_OF_DOCUMENT
from spectrim.lab.data.tokens import Tokens, describe_tokens, prepare_tokens, resolve_data
from spectrim.lab.errors import LabError


@pytest.fixture
def data(text_folder: Path) -> DataConfig:
    return DataConfig(sources=(str(text_folder),), vocabulary_size=300, sequence_length=16)


def sides_of(data: DataConfig) -> dict[str, list[Document]]:
    documents = list(read_sources(parse_sources(data.sources), data.text_column))
    [split] = split_corpus([survey(documents)], data.validation_fraction)
    sides: dict[str, list[Document]] = {"train": [], "validation": []}
    for side, document in split.sides(documents):
        sides[side].append(document)
    return sides


def text_of(tokens: Tokens, side: str) -> str:
    assert tokens.tokenizer is not None
    decoder = tokenizers.Tokenizer.from_file(str(tokens.tokenizer))
    [stream] = getattr(tokens, side)
    return str(decoder.decode(np.concatenate(stream.arrays).tolist(), skip_special_tokens=False))


def test_tokens_decode_to_the_documents_with_an_end_after_each(data: DataConfig, cache_dir: Path) -> None:
    tokens = prepare_tokens(data, cache_dir)
    for side, documents in sides_of(data).items():
        assert text_of(tokens, side) == "".join(document.text + END_OF_DOCUMENT for document in documents)
    assert int(tokens.train[0].arrays[0].max()) < 300
    assert tokens.statistics["train"]["documents"] + tokens.statistics["validation"]["documents"] == 8


def test_a_corpus_beyond_every_limit_has_the_same_tokens(
    data: DataConfig, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_tokens(data, cache_dir)
    monkeypatch.setattr(module, "BATCH", 1000)
    monkeypatch.setattr(module, "LARGE", 1000)
    pieces = prepare_tokens(data, tmp_path)
    assert pieces.key == whole.key
    assert np.array_equal(pieces.train[0].arrays[0], whole.train[0].arrays[0])
    # The second time nothing is read at all.
    monkeypatch.setattr(module, "survey", lambda _: pytest.fail("read again"))
    assert prepare_tokens(data, tmp_path).key == whole.key


def test_a_large_corpus_that_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 1000)
    file = tmp_path / "a.txt"
    data = DataConfig(sources=(str(file),), vocabulary_size=300, sequence_length=4, validation_fraction=0.3)
    file.write_text("some words to begin with\n" * 60)
    before = prepare_tokens(data, tmp_path / "cache")
    file.write_text("some words to go on with\n\n" * 60)
    assert prepare_tokens(data, tmp_path / "cache").key != before.key


def test_a_tokenizer_learns_from_a_sample_of_a_large_corpus(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    learn = tokenizer.learn_tokenizer

    def spy(texts: object, vocabulary_size: int) -> tokenizer.Tokenizer:
        seen.extend(texts)  # type: ignore[call-overload]
        return learn(seen, vocabulary_size)

    monkeypatch.setattr(module, "learn_tokenizer", spy)
    monkeypatch.setattr(module, "SAMPLE", sum(len(each.text) for side in sides_of(data).values() for each in side) // 2)
    prepare_tokens(data, tmp_path)
    train = [document.text for document in sides_of(data)["train"]]
    assert 0 < len(seen) < len(train)
    assert set(seen) < set(train)


def test_text_that_spells_the_end_of_document_token_stays_text(tmp_path: Path, cache_dir: Path) -> None:
    text = f"before {END_OF_DOCUMENT} after, and some more words here\n" * 20
    (tmp_path / "a.txt").write_text(text)
    data = DataConfig(
        sources=(str(tmp_path / "a.txt"),), vocabulary_size=300, sequence_length=4, validation_fraction=0.3
    )
    tokens = prepare_tokens(data, cache_dir)
    assert Counter(tokens.train[0].arrays[0].tolist())[tokens.end] == 1


def test_the_cache_is_used_again_for_equal_content_under_another_name(
    data: DataConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_tokens(data, cache_dir)
    (tmp_path / "copies.jsonl").write_text(
        "".join(json.dumps({"text": file.read_text()}) + "\n" for file in sorted(Path(data.sources[0]).iterdir()))
    )
    monkeypatch.setattr(module, "build_cache", lambda *_: pytest.fail("tokenized again"))
    copies = data.model_copy(update={"sources": (str(tmp_path / "copies.jsonl"),)})
    assert prepare_tokens(copies, cache_dir).key == first.key


def test_the_cache_key_changes_with_content_and_settings(data: DataConfig, tmp_path: Path, cache_dir: Path) -> None:
    key = prepare_tokens(data, cache_dir).key
    (tmp_path / "more.txt").write_text("one more document " * 100)
    more = data.model_copy(update={"sources": (*data.sources, str(tmp_path / "more.txt"))})
    assert prepare_tokens(more, cache_dir).key != key
    assert prepare_tokens(data.model_copy(update={"vocabulary_size": 301}), cache_dir).key != key
    assert prepare_tokens(data.model_copy(update={"validation_fraction": 0.4}), cache_dir).key != key
    # How tokens are cut into batches does not change them.
    assert prepare_tokens(data.model_copy(update={"batch_size": 3, "sequence_length": 8}), cache_dir).key == key


def test_the_default_corpus_has_the_key_that_published_results_have() -> None:
    # benchmarks/results rest on these tokens; the hash covers every document, the split and the settings.
    groups = group_sources(DataConfig())
    surveys = [survey(groups[0].documents("text"))]
    settings = module.cache_settings(DataConfig(), None)
    assert module.cache_key(settings, surveys, split_corpus(surveys, 0.05)) == "3f5b636a0cddfd885374c95992b66c82"


def test_a_failure_leaves_no_half_made_cache(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "encode", fail)
    with pytest.raises(OSError, match="No space"):
        prepare_tokens(data, tmp_path)
    assert not any((tmp_path / "tokens").iterdir())


def test_data_that_changes_while_it_is_read_is_refused(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for file in Path(data.sources[0]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    learn = tokenizer.learn_tokenizer

    def learn_and_write(texts: object, vocabulary_size: int) -> tokenizer.Tokenizer:
        learned = learn(texts, vocabulary_size)  # type: ignore[arg-type]
        (folder / "late.txt").write_text("a document that was not there")
        return learned

    monkeypatch.setattr(module, "learn_tokenizer", learn_and_write)
    with pytest.raises(LabError, match="changed while it was being read"):
        prepare_tokens(data.model_copy(update={"sources": (str(folder),)}), tmp_path / "cache")
    assert not any((tmp_path / "cache" / "tokens").iterdir())


def test_text_shorter_than_a_sequence_is_refused_with_both_lengths(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(LabError, match=r"short\.txt.* tokens, one sequence needs 129"):
        prepare_tokens(DataConfig(sources=(str(tmp_path / "short.txt"),)), cache_dir)


def test_text_of_nothing_is_refused_by_name(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(LabError, match=r"blank\.jsonl.*empty corpus"):
        prepare_tokens(DataConfig(sources=(str(tmp_path / "blank.jsonl"),)), cache_dir)


def test_weighted_sources_are_streams_of_their_own_with_one_tokenizer(
    data: DataConfig, tmp_path: Path, cache_dir: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {row} of another kind"}) + "\n" for row in range(200)))
    data = data.model_copy(update={"sources": (f"{data.sources[0]}@3", f"{rows}@1")})
    tokens = prepare_tokens(data, cache_dir)
    assert [stream.weight for stream in tokens.train] == [3.0, 1.0]
    assert tokens.tokenizer is not None
    decoder = tokenizers.Tokenizer.from_file(str(tokens.tokenizer))
    for side, streams in (("train", tokens.train), ("validation", tokens.validation)):
        text, lines = (decoder.decode(stream.arrays[0].tolist()) for stream in streams)
        assert "congress" in text
        assert "row" in lines
        assert "congress" not in lines
        parts = [part[side] for part in tokens.statistics["sources"]]
        assert sum(part["documents"] for part in parts) == tokens.statistics[side]["documents"]
        assert [part["tokens"] for part in parts] == [len(stream) for stream in streams]
    # Other weights are other batches of the same tokens.
    other = data.model_copy(update={"sources": (f"{data.sources[0][:-2]}@1", f"{rows}@1")})
    assert prepare_tokens(other, cache_dir).key == tokens.key
    with pytest.raises(LabError, match=r"rows\.jsonl@0\.001.* below a thousandth"):
        prepare_tokens(data.model_copy(update={"sources": (data.sources[0], f"{rows}@0.001")}), cache_dir)


def test_a_description_counts_and_samples(data: DataConfig, cache_dir: Path) -> None:
    description = describe_tokens(prepare_tokens(data, cache_dir))
    assert description["sample"].split()[0].isalpha()
    assert description["train"]["tokens"] > description["validation"]["tokens"] > 0


def test_what_is_left_to_defaults_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    resolved = resolve_data(DataConfig(sources=("a.txt",)))
    assert (resolved.sources, resolved.vocabulary_size) == ((str(tmp_path / "a.txt"),), 2048)
    assert resolve_data(resolved) == resolved
    own = resolve_data(DataConfig(tokenizer="tokenizer.json"))
    assert (own.tokenizer, own.vocabulary_size) == (str(tmp_path / "tokenizer.json"), None)
    with pytest.raises(LabError, match=r"vocabulary_size=500: tokenizer 'tokenizer\.json' has its own"):
        resolve_data(DataConfig(tokenizer="tokenizer.json", vocabulary_size=500))
