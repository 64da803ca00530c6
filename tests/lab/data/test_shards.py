"""Token shards: what a folder may hold, where it is split, how it goes with text and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from spectrim.lab.config import DataConfig, TrainConfig
from spectrim.lab.data.shards import cut, open_shards
from spectrim.lab.data.tokens import describe_tokens, prepare_tokens
from spectrim.lab.errors import LabError
from spectrim.lab.training.run import train

END = 7


def write_shards(folder: Path, shards: dict[str, np.ndarray], **description: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"vocabulary_size": 300, "end_of_document": END, "dtype": "uint16", **description}
    (folder / "shards.json").write_text(json.dumps(values))
    for name, array in shards.items():
        if name.endswith(".npy"):
            np.save(folder / name, array)
        else:
            array.tofile(folder / name)
    return folder


def documents(count: int, length: int = 50, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(8, 300, count * length).astype(np.uint16)
    tokens[length - 1 :: length] = END
    return tokens


def test_shards_of_both_formats_are_one_stream_split_behind_a_document(tmp_path: Path, cache_dir: Path) -> None:
    parts = {"b.bin": documents(20, seed=1), "a.npy": documents(20, seed=2), "c.npy": documents(10, seed=3)}
    write_shards(tmp_path, parts)
    tokens = prepare_tokens(DataConfig(sources=(str(tmp_path),), validation_fraction=0.1), cache_dir)
    [train_stream], [validation] = tokens.train, tokens.validation
    everything = np.concatenate([parts["a.npy"], parts["b.bin"], parts["c.npy"]])
    assert np.array_equal(np.concatenate(train_stream.arrays), everything[:2300])
    assert np.array_equal(np.concatenate(validation.arrays), everything[2300:])
    assert (tokens.vocabulary_size, tokens.end, tokens.tokenizer) == (300, END, None)
    description = describe_tokens(tokens)
    assert description["train"] == {"documents": None, "bytes": None, "tokens": 2300}
    assert description["sample"].split() == [str(token) for token in everything[:100]]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=20), st.integers(1, 5), st.floats(0.05, 0.5))
def test_no_document_is_cut(lengths: list[int], pieces: int, fraction: float) -> None:
    everything = np.concatenate([[*range(100, 99 + length), END] for length in lengths]).astype(np.uint16)
    arrays = np.array_split(everything, pieces)
    train_part, validation = cut(arrays, "here", END, fraction)
    assert np.array_equal(np.concatenate([*train_part, *validation]), everything)
    assert train_part[-1][-1] == END
    target = int(len(everything) * (1 - fraction))
    cut_at = sum(map(len, train_part))
    if cut_at <= target:  # the last document alone is more than the share
        assert cut_at == len(everything) - lengths[-1]
    assert cut_at <= target + max(lengths)


@pytest.mark.parametrize("name", ["val.npy", "data_validation_000.npy", "fineweb-val-0.npy"])
def test_shards_named_for_validation_are_held_back(tmp_path: Path, name: str) -> None:
    train_part, held_back = documents(20), documents(4, seed=1)
    folder = write_shards(tmp_path, {"train.npy": train_part, "value.npy": train_part, name: held_back})
    shards = open_shards(folder, 0.05)
    assert [len(array) for array in shards.train] == [1000, 1000]
    assert [array.tolist() for array in shards.validation] == [held_back.tolist()]


@pytest.mark.parametrize(
    ("shards", "description", "message"),
    [
        ({}, {}, "empty data set"),
        ({"a.bin": documents(2)}, {"dtype": None}, r"a\.bin': shards\.json beside it has dtype None, expected uint16"),
        ({"a.bin": np.zeros(3, np.uint8)}, {}, r"has 3 bytes, expected a positive multiple of 2"),
        ({"a.npy": np.zeros((2, 3), np.uint16)}, {}, r"array of uint16 of shape \(2, 3\)"),
        ({"a.npy": np.zeros(9, np.float32)}, {}, "array of float32"),
        ({"a.npy": documents(2)}, {"end_of_document": 300}, "end_of_document 300 is not below vocabulary_size 300"),
        ({"a.npy": documents(2)}, {"end_of_document": 5}, "no end_of_document 5 between two documents"),
        ({"a.npy": documents(2)}, {"end_of_document": None}, "names no end_of_document to cut at"),
        ({"a.npy": documents(2)}, {"vocabulary_size": None}, "vocabulary_size=None"),
        ({"a.npy": documents(2)}, {"tokens": 3}, "unknown key 'tokens', expected one of vocabulary_size"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, shards: dict[str, np.ndarray], description: dict[str, Any], message: str
) -> None:
    with pytest.raises(LabError, match=message):
        open_shards(write_shards(tmp_path, shards, **description), 0.05)


def test_a_file_that_is_not_an_array_is_refused_by_name(tmp_path: Path) -> None:
    write_shards(tmp_path, {})
    (tmp_path / "a.npy").write_text("no array")
    with pytest.raises(LabError, match=r"a\.npy' is not a \.npy file"):
        open_shards(tmp_path, 0.05)


def test_a_run_on_shards_exports_a_model_without_tokenizer(small_config: TrainConfig, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", {"a.npy": documents(100)})
    data = small_config.data.model_copy(update={"sources": (str(folder),), "vocabulary_size": None})
    result = train(small_config.model_copy(update={"data": data}), tmp_path / "run", cache_dir=tmp_path / "cache")
    assert result.final_loss is not None
    exported = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "model.safetensors" in exported
    assert not any("tokenizer" in name for name in exported)
    # Other tokens under the same name are other data.
    key = prepare_tokens(data, tmp_path / "cache").key
    write_shards(tmp_path / "shards", {"a.npy": documents(100, seed=5)})
    assert prepare_tokens(data, tmp_path / "cache").key != key


def test_shards_and_text_go_together_with_the_tokenizer_of_both(
    text_folder: Path, tmp_path: Path, cache_dir: Path
) -> None:
    text = DataConfig(sources=(str(text_folder),), vocabulary_size=300, sequence_length=16)
    made = prepare_tokens(text, cache_dir)
    assert made.tokenizer is not None
    folder = write_shards(tmp_path / "shards", {"a.npy": made.train[0].arrays[0]}, end_of_document=0)
    mixed = text.model_copy(update={"sources": (str(folder), str(text_folder)), "vocabulary_size": None})
    with pytest.raises(LabError, match="needs the --tokenizer that they were made with"):
        prepare_tokens(mixed, cache_dir)
    (folder / "tokenizer.json").write_bytes(made.tokenizer.read_bytes())
    own = tokenizers.Tokenizer.from_file(str(made.tokenizer)).get_vocab_size()
    if own != 300:
        with pytest.raises(LabError, match=rf"shards have vocabulary_size 300, tokenizer .* has {own}"):
            prepare_tokens(mixed, cache_dir)
    write_shards(folder, {}, end_of_document=0, vocabulary_size=own)
    tokens = prepare_tokens(mixed, cache_dir)
    [stream] = tokens.train
    assert [len(array) for array in stream.arrays][1:] == [len(made.train[0])]
    assert describe_tokens(tokens)["sample"].split()[0].isalpha()
    weighted = mixed.model_copy(update={"sources": (f"{folder}@1", f"{text_folder}@3")})
    assert [len(each.arrays) for each in prepare_tokens(weighted, cache_dir).train] == [1, 1]
