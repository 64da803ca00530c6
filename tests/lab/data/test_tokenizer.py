"""Tokenizers of the user's own: read, checked, followed by the model, exported with it."""

from pathlib import Path

import pytest
import tokenizers
import transformers

from spectrim.lab.config import DataConfig, TrainConfig
from spectrim.lab.data.tokenizer import load_tokenizer
from spectrim.lab.data.tokens import prepare_tokens
from spectrim.lab.errors import LabError
from spectrim.lab.training.run import train

TEXT = "the people of the union"


def word_tokenizer(specials: list[str]) -> tokenizers.Tokenizer:
    """One token a word of the tests' texts."""
    words = ("the", "of", "and", "to", "union", "congress", "public", "people", "peace", "law", "year", "country")
    vocabulary = {token: index for index, token in enumerate([*specials, "?", "nation", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    return tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    word_tokenizer(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrained"
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(["</s>", "<stop>"]), eos_token="<stop>", unk_token="?"
    )
    wrapped.chat_template = "{{ messages }}"
    wrapped.save_pretrained(folder)
    return folder


def test_a_file_and_a_folder_are_read_with_their_end_of_document(file: Path, folder: Path) -> None:
    one, two = load_tokenizer(str(file)), load_tokenizer(str(folder))
    assert (one.end_of_document, one.end, one.vocabulary_size) == ("</s>", 0, 15)
    assert (two.end_of_document, two.end, two.vocabulary_size) == ("<stop>", 1, 16)
    assert load_tokenizer(str(folder), "</s>").end == 0
    assert one.digest != two.digest
    assert one.encode(["the </s> union"])[0][-1] == 0
    assert one.encode(["the </s> union"])[0].count(0) == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_model_follows_the_tokenizer_and_is_exported_with_it(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    path = request.getfixturevalue(kind)
    data = small_config.data.model_copy(update={"vocabulary_size": None, "tokenizer": str(path)})
    train(small_config.model_copy(update={"data": data, "steps": 2}), tmp_path / "run", cache_dir=cache_dir)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    own = load_tokenizer(str(path))
    assert [*exported(TEXT).input_ids, own.end] == own.encode([TEXT])[0]
    assert exported.eos_token == own.end_of_document
    assert exported.chat_template == ("{{ messages }}" if kind == "folder" else None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.vocab_size, model.config.eos_token_id) == (own.vocabulary_size, own.end)


def test_another_tokenizer_is_another_key(text_folder: Path, file: Path, cache_dir: Path) -> None:
    data = DataConfig(sources=(str(text_folder),), tokenizer=str(file), sequence_length=16)
    tokens = prepare_tokens(data, cache_dir)
    # A token a word, and an end a document.
    words = sum(len(path.read_text().split()) for path in text_folder.iterdir())
    assert len(tokens.train[0]) + len(tokens.validation[0]) == words + 8
    word_tokenizer(["</s>", "more"]).save(str(file))
    assert prepare_tokens(data, cache_dir).key != tokens.key


def test_a_tokenizer_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="'nowhere': no such file or folder"):
        load_tokenizer("nowhere")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(LabError, match=r"broken\.json' is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(LabError, match="bare' cannot be read"):
        load_tokenizer(str(tmp_path / "bare"))
    word_tokenizer(["<stop>", "<pad>"]).save(str(tmp_path / "strange.json"))
    with pytest.raises(LabError, match=r"no end of a document that the lab knows; .* special tokens are <pad>, <stop>"):
        load_tokenizer(str(tmp_path / "strange.json"))
    assert load_tokenizer(str(tmp_path / "strange.json"), "<stop>").end == 0
    with pytest.raises(LabError, match="has no token '<halt>'"):
        load_tokenizer(str(tmp_path / "strange.json"), "<halt>")
