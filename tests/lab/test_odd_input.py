"""Files and names that nobody expects: one line, exit code 2, and nothing left behind."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrim.cli import main
from spectrim.lab.config import DataConfig, TrainConfig
from spectrim.lab.data.source_files import find_files
from spectrim.lab.data.tokens import prepare_tokens
from spectrim.lab.errors import Interrupted, LabError, LabWarning
from spectrim.lab.experiments import sweep as sweeping
from spectrim.lab.files import parse_json, read_lines
from spectrim.lab.logging.log import StepRecord
from spectrim.lab.models.build import build_model
from spectrim.lab.paths import matches
from spectrim.lab.training.run import train

WORDS = " ".join(f"word{number % 97}" for number in range(3000))
TINY = ["--preset", "tiny", "--batch-size", "2", "--sequence-length", "16", "--steps", "2", "--cache-dir", "cache"]


NOT_UTF8 = "caf\udce9"
"""A name of the bytes b"caf\\xe9"."""


def make_pipe() -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo("pipe")


def make_not_utf8(folder: Path) -> None:
    try:
        (folder / f"{NOT_UTF8}.txt").write_text(WORDS)
    except (OSError, UnicodeError):
        pytest.skip("this file system wants names in UTF-8")


def row(text: str, more: str = "null") -> str:
    return f'{{"text": {text}, "n": {more}}}\n'


def write_text(path: Path, words: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(WORDS.split()[:words]))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "ok.txt", 2000)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that is to be refused says; it leaves nothing but perhaps a cache."""
    before = set(os.listdir())  # noqa: PTH208 - names that are not UTF-8
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert set(os.listdir()) - before <= {"cache"}  # noqa: PTH208
    return said.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (row('"half of an emoji \\ud83d"'), "line 1: column 'text' holds half of a surrogate pair"),
        (row("null", "1" * 6000), "line 1: Exceeds the limit"),
        (row("null", "[" * 100_000 + "]" * 100_000), "line 1: nested too deeply"),
        ('{"text": "fine"}\n{"text": NO}\n', "line 2: not JSON: column 10"),
    ],
)
def test_rows_that_python_cannot_hold_are_named_by_their_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (folder / "rows.jsonl").write_text(text)
    assert message in refused(capsys, "corpus", "--data", "rows.jsonl", "--cache-dir", "cache")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a/**.txt", "'**' is any number of folders and stands alone, as in **/*.txt"),
        ("~nobody-of-that-name/x.txt", "there is no user of that name"),
        ("", "an empty name"),
        ("  ", "an empty name"),
        ("pipe", "is neither a file nor a folder"),
        ("x" * 300, "File name too long"),
        (f"{NOT_UTF8}.txt", "the name is not UTF-8"),
        ("ok.txt@-1", "weight -1 is not a positive number"),
    ],
)
def test_a_name_that_is_no_file_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    make_pipe()
    make_not_utf8(Path())
    assert message in refused(capsys, "train", "adamw", "--data", source, "--out", "run", *TINY)
    assert message in refused(capsys, "corpus", "--data", source, "--cache-dir", "cache")


@pytest.mark.parametrize("flag", ["--tokenizer", "--weights", "--model"])
@pytest.mark.parametrize("name", ["", "~nobody-of-that-name/x", NOT_UTF8, "x" * 300, "pipe"])
def test_so_is_one_of_a_model_or_a_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    make_pipe()
    sizes = [word for word in TINY if word not in ("--preset", "tiny")]
    assert refused(capsys, "train", "adamw", "--data", "ok.txt", "--out", "run", flag, name, *sizes)


def test_names_that_are_not_utf8_inside_of_a_folder_are_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    make_not_utf8(Path("texts"))
    assert main(["corpus", "--data", "texts", "--vocabulary-size", "300", "--cache-dir", "cache"]) == 0


@pytest.mark.parametrize(
    ("file", "text", "arguments"),
    [
        ("deep.toml", "a = " + "[" * 5000 + "]" * 5000, ["train", "--config", "deep.toml", "--out", "run"]),
        ("long.toml", "steps = " + "1" * 6000, ["train", "--config", "long.toml", "--out", "run"]),
        ("large.toml", "steps = 99999999999999999999", ["train", "--config", "large.toml", "--out", "run"]),
        ("batch.toml", "[data]\nbatch_size = 1000000000000", ["train", "--config", "batch.toml", "--out", "run"]),
        ("size.toml", "[data]\nvocabulary_size = 1000000000000", ["train", "--config", "size.toml", "--out", "run"]),
        ("config.json", '{"model_type": ' + "[" * 100_000, ["train", "adamw", "--model", "config.json", "--out", "r"]),
        ("shards.json", "1" * 6000, ["corpus", "--data", "."]),
        ("results.json", "[" * 100_000, ["report", "."]),
        ("spectrum.json", "{", ["report", "."]),
        ("name.txt", "", ["compare", "--name", "a\nb"]),
    ],
)
def test_files_of_settings_and_results_are_as_odd(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, arguments: list[str]
) -> None:
    Path(file).write_text(text)
    refused(capsys, *arguments)


@pytest.fixture
def _closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder "closed" that may not be read, whoever runs the tests."""
    scandir = os.scandir

    def refuse(path: str | os.PathLike[str] = ".") -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.usefixtures("_closed")
@pytest.mark.parametrize("source", ["data", "data/**/*.txt", "data/*/*.txt", "data/closed/*.txt"])
def test_a_folder_that_may_not_be_read_is_named_and_not_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    for place in ("data/closed/deep/a.txt", "data/closed/b.txt", "data/open/c.txt"):
        write_text(folder / place, 300)
    message = refused(capsys, "corpus", "--data", source, "--cache-dir", "cache")
    assert f"data {str(folder / 'data' / 'closed')!r}: Permission denied" in message
    # What lies beside it can be named.
    assert [path.name for path in find_files(str(folder / "data/o*/*.txt"))] == ["c.txt"]


def test_globs_match_what_those_of_the_standard_library_do(tmp_path: Path) -> None:
    for name in ("a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.md", ".hidden/a.txt", "b/.a.txt", "[x]/a.txt", "é/ü.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for pattern in (
        "*.txt",
        "**/*.txt",
        "b/*",
        "*/*.txt",
        "**/c/**/*",
        "?/a.txt",
        "[a-c]/*",
        "b/[!c]*",
        "none/*",
    ):
        expected = sorted(tmp_path.glob(pattern))
        found = sorted(matches(tmp_path / pattern))
        assert [path for path in found if path.is_file()] == [path for path in expected if path.is_file()], pattern
    # At the end of a pattern it means files too, whatever the version of Python.
    assert sum(path.is_file() for path in matches(tmp_path / "b" / "**")) == 4


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\nnull\n{"cut sh')
    with pytest.raises(LabError, match=r"log\.jsonl', line 2: expected a JSON object"):
        read_lines(file)
    file.write_bytes(b'{"step": 1}\n{"cut sh')
    assert read_lines(file) == [{"step": 1}]
    with pytest.raises(LabError, match="x: not UTF-8 text"):
        parse_json(b'"\xff"', "x")


@pytest.mark.parametrize("kept", [0, 4, 5000])
def test_weights_that_are_cut_short_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], kept: int) -> None:
    build_model("tiny", vocabulary_size=300, sequence_length=16, seed=0).save_pretrained("model")  # type: ignore[operator]
    file = folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    sizes = [word for word in TINY if word not in ("--preset", "tiny")]
    options = ["--weights", "model", "--vocabulary-size", "300", "--lr", "0.001", *sizes]
    said = refused(capsys, "train", "adamw", "--data", "ok.txt", "--out", "run", *options)
    assert f"weights {str(folder / 'model')!r} cannot be read" in said


# -- A vocabulary that the text does not fill --------------------------------------------------------------------------


def test_a_vocabulary_beyond_the_text_says_how_large_it_became(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", "ok.txt", "--vocabulary-size", "5000", "--cache-dir", "cache"]
    assert main(["corpus", *options, "--json"]) == 0
    said = capsys.readouterr()
    size = json.loads(said.out)["vocabulary_size"]
    assert 256 < size < 5000
    assert f"vocabulary_size=5000: the text gives {size} tokens" in said.err
    sizes = [word for word in TINY if word not in ("--cache-dir", "cache")]
    assert main(["train", "adamw", "--out", "run", *options, *sizes]) == 0
    assert json.loads((folder / "run/model/config.json").read_text())["vocab_size"] == size
    # A model that has a vocabulary of its own, of the size that was asked for, keeps it.
    (folder / "own.toml").write_text(
        'model_type = "llama"\nvocab_size = 5000\nhidden_size = 16\nintermediate_size = 16\nnum_hidden_layers = 1\n'
        "num_attention_heads = 1\nnum_key_value_heads = 1\n"
    )
    sizes = [word for word in sizes if word not in ("--preset", "tiny")]
    assert main(["train", "adamw", "--out", "own", "--model", "own.toml", "--lr", "0.001", *options, *sizes]) == 0
    assert json.loads((folder / "own/model/config.json").read_text())["vocab_size"] == 5000


# -- The cache of tokens -----------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, flip])
@pytest.mark.parametrize("part", ["train.npy", "validation.npy", "tokenizer.json", "statistics.json"])
def test_a_damaged_cache_of_tokens_is_made_anew(
    text_folder: Path, tmp_path: Path, spoil: object, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrim.lab.data.token_cache.LARGE", 10_000_000)
    data = DataConfig(sources=(str(text_folder),), vocabulary_size=300, sequence_length=16)
    before = prepare_tokens(data, tmp_path)
    stored = np.array(before.train[0].arrays[0])
    spoil(tmp_path / "tokens" / before.key / part)  # type: ignore[operator]
    with pytest.warns(LabWarning, match="are made anew: it"):
        after = prepare_tokens(data, tmp_path)
    assert after.key == before.key
    assert np.array_equal(after.train[0].arrays[0], stored)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [before.key]


def test_a_pointer_into_the_cache_that_is_damaged_is_not_followed(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrim.lab.data.token_cache.LARGE", 1000)
    data = DataConfig(sources=(str(text_folder),), vocabulary_size=300, sequence_length=16)
    key = prepare_tokens(data, tmp_path).key
    [pointer] = (tmp_path / "tokens" / "by-file-times").iterdir()
    for text in (b"", b"../../elsewhere", b"\xff\xfe", b"." * 300):
        pointer.write_bytes(text)
        assert prepare_tokens(data, tmp_path).key == key


# -- Runs and sweeps that came to nothing ------------------------------------------------------------------------------


def with_gradients_of(value: float, monkeypatch: pytest.MonkeyPatch, *, until: int) -> None:
    """Make every gradient of the first steps one value."""
    steps = []

    def spoil(model: torch.nn.Module, *_: object) -> torch.Tensor:
        steps.append(1)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if len(steps) <= until:
            for gradient in gradients:
                gradient.fill_(value)
        return torch.nn.utils.get_total_norm(gradients)

    monkeypatch.setattr("spectrim.lab.training.loop.clip_gradient", spoil)


def test_a_run_whose_every_gradient_was_skipped_says_that_nothing_was_trained(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gradients_of(float("nan"), monkeypatch, until=100)
    arguments = ["train", "adamw", "--out", "run", "--data", "ok.txt", "--vocabulary-size", "300", *TINY]
    assert main(arguments) == 2
    assert "no gradient was finite in the 2 steps of run" in capsys.readouterr().err
    result = json.loads((folder / "run/result.json").read_text())
    assert (result["final_loss"], result["dynamics"]["diverged"], result["dynamics"]["skipped"]) == (None, True, 2)
    assert set(result["curve"]["val_loss"]) == {None}


def test_some_skipped_steps_are_told_and_most_are_a_divergence(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for skipped, diverged in ((1, False), (4, True)):
        with_gradients_of(float("inf"), monkeypatch, until=skipped)
        result = train(small_config, tmp_path / str(skipped), cache_dir=cache_dir)
        assert result.dynamics is not None
        assert (result.dynamics.skipped, result.dynamics.diverged) == (skipped, diverged)
        assert result.final_loss is not None


def test_a_sweep_that_is_stopped_before_a_trial_ends_says_so_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sweeping.train

    def stopped(*arguments: object, on_step: object, **options: object) -> object:
        def stop(record: StepRecord) -> None:
            raise Interrupted(15, " after step 1 of 2")

        return original(*arguments, on_step=stop, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeping, "train", stopped)
    words = ["--name", "s", "--trials", "1", "--steps", "2", "--preset", "tiny", "--cache-dir", "cache"]
    words += ["--data", "ok.txt", "--vocabulary-size", "300", "--batch-size", "2", "--sequence-length", "16"]
    assert main(["sweep", "adamw", *words]) == 128 + 15
    said = capsys.readouterr().err
    assert "no trial has ended yet; those that have begun go on when the sweep is called again" in said
    assert "Traceback" not in said
    assert (folder / "runs/s/summary.md").is_file()
    assert main(["report", "runs/s"]) == 0
    assert "No trial has reached its end yet." in (folder / "runs/s/report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(sweeping, "train", original)
    assert main(["sweep", "adamw", *words]) == 0
    assert "no trial has ended" not in capsys.readouterr().err
