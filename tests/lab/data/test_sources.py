"""Every kind of source gives the documents that are in it, and what is wrong with one is said with its place."""

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.lab.data import sources as module
from spectrim.lab.data.sources import Source, parse_sources, read_sources, resolve_sources
from spectrim.lab.errors import LabError

ROWS = [{"text": "one\ntwo", "id": 1}, {"text": "  "}, {"text": None}, {"text": "three", "id": 2}]


def read(*sources: object, column: str = "text") -> list[str]:
    return [document.text for document in read_sources(parse_sources(list(map(str, sources))), column)]


def write_lines(path: Path, rows: Sequence[object] = ROWS) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_files_folders_and_globs_are_read_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", "skipped.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.md", "b.txt", "deep/c.txt"]
    assert read(tmp_path / "*.txt", tmp_path) == ["b.txt", "a.md", "deep/c.txt"]
    assert read(tmp_path / "skipped.bin") == ["skipped.bin"]
    monkeypatch.chdir(tmp_path)
    assert read("**/*.txt") == ["b.txt", "deep/c.txt"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
def test_a_line_of_json_is_a_document(tmp_path: Path, name: str) -> None:
    assert read(write_lines(tmp_path / name)) == ["one\ntwo", "three"]


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "rows.parquet", {"body": [row["text"] for row in ROWS], "id": [1, 2, 3, 4]})
    assert read(file, column="body") == ["one\ntwo", "three"]
    assert read(tmp_path, column="body") == ["one\ntwo", "three"]


@given(lines=st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_a_long_text_is_read_in_parts_that_add_up(tmp_path_factory: pytest.TempPathFactory, lines: list[int]) -> None:
    file = tmp_path_factory.getbasetemp() / "long.txt"
    text = "\n".join("x" * length for length in lines)
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONG_TEXT", 64)
        patch.setattr(module, "PART", 32)
        parts = [document.text for document in module.read_text(file)]
    assert "".join(parts) == text
    assert len(parts) == 1 or all(len(part) <= 64 for part in parts)
    assert len(parts) == 1 if len(text) < 64 else len(parts) >= len(text) / 64


def test_a_data_set_of_the_hub_is_asked_for_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Any:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hub:owner/name") == ["one\ntwo", "three"]
    assert read("hub:owner/name:en:validation@2") == ["one\ntwo", "three"]
    assert asked == [("owner/name", None, "train"), ("owner/name", "en", "validation")]
    with pytest.raises(LabError, match=r"'hub:owner/name' has no column 'body', expected one of text, id"):
        read("hub:owner/name", column="body")


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "plain") == read(tmp_path / "splits") == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file"),
        ("none-*.txt", "no such file"),
        ("bare", "no text files"),
        ("picture.txt", "is not UTF-8 text"),
        ("half.jsonl.gz", "not a whole gzip file"),
        ("broken.jsonl", "line 2: not JSON: column 10"),
        ("list.jsonl", "line 1: expected an object"),
        ("columns.jsonl", "line 2 has no column 'text', expected one of body, id as --text-column"),
        ("number.jsonl", "line 1: column 'text' holds int, expected text"),
        ("columns.parquet", "has no column 'text', expected one of body, id"),
        ("number.parquet", "row 1: column 'text' holds int"),
        ("fake.parquet", "is not a parquet file"),
        ("zero.txt@0", "weight 0 is not a positive number"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_with_the_place_in_it(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff")
    whole = gzip.compress(b'{"text": "words"}\n' * 1000)
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": fine}\n')
    write_lines(tmp_path / "list.jsonl", [["text"]])
    write_lines(tmp_path / "columns.jsonl", [{"text": "x"}, {"body": "x", "id": 1}])
    write_lines(tmp_path / "number.jsonl", [{"text": 3}])
    (tmp_path / "fake.parquet").write_text("no parquet")
    if source.endswith(".parquet") and source != "fake.parquet":
        write_parquet(tmp_path / "columns.parquet", {"body": ["x"], "id": [1]})
        write_parquet(tmp_path / "number.parquet", {"text": [3]})
    with pytest.raises(LabError, match=message) as caught:
        read(tmp_path / source)
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "rows.parquet"), ("datasets", "hub:owner/name")])
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LabError, match=rf"needs the package '{package}': pip install 'spectrim\[data\]'"):
        read(source)


def test_weights_follow_an_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name@2").touch()
    (tmp_path / "user@home").touch()
    assert resolve_sources(["a.txt@0.25", "hub:owner/name@3"]) == (f"{tmp_path}/a.txt@0.25", "hub:owner/name@3")
    assert parse_sources(["name@2", "user@home"]) == [
        Source(location=str(tmp_path / "name@2")),
        Source(location=str(tmp_path / "user@home")),
    ]
    assert parse_sources(["name@2@0.5"]) == [Source(location=str(tmp_path / "name@2"), weight=0.5)]
    with pytest.raises(LabError, match=r"name@2' has no weight, but others have"):
        parse_sources(["name@2", "a.txt@0.25"])
