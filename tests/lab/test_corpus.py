from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spectrim.lab.corpus import Document, read_documents, split_documents
from spectrim.lab.errors import LabError


def documents(*texts: str) -> list[Document]:
    return [Document(name=str(index), text=text) for index, text in enumerate(texts)]


def characters(side: tuple[Document, ...]) -> int:
    return sum(len(document.text) for document in side)


def test_addresses_are_the_default_corpus() -> None:
    addresses = read_documents()
    assert len(addresses) > 200
    assert sum(len(address.text) for address in addresses) > 10_000_000
    split = split_documents(addresses, 0.05)
    share = characters(split.validation) / sum(len(address.text) for address in addresses)
    assert 0.04 < share < 0.06


@given(st.lists(st.text(min_size=1), min_size=2, max_size=30), st.floats(0.01, 0.6))
@example(["0", "00000"], 0.59375)
def test_no_document_is_on_both_sides_and_none_is_lost(texts: list[str], fraction: float) -> None:
    everything = documents(*texts)
    split = split_documents(everything, fraction)
    if len(set(texts)) > 1:
        assert not {document.text for document in split.train} & {document.text for document in split.validation}
        assert split.train
        assert split.validation
        assert sorted(document.name for document in split.train + split.validation) == sorted(
            document.name for document in everything
        )


@given(st.permutations([f"document {index} " * (index + 1) for index in range(12)]))
def test_the_split_depends_on_content_alone(texts: list[str]) -> None:
    expected = split_documents(documents(*sorted(texts)), 0.1)
    split = split_documents(documents(*texts), 0.1)
    assert {document.text for document in split.validation} == {document.text for document in expected.validation}


def test_copies_of_a_document_land_on_the_same_side() -> None:
    split = split_documents(documents("a" * 50, "b" * 50, "a" * 50, "b" * 50), 0.5)
    assert len({document.text for document in split.validation}) == 1
    assert len(split.validation) == 2


def test_a_tiny_document_does_not_make_up_the_validation_set_alone() -> None:
    texts = [letter * 1000 for letter in "abcdefghij"]
    split = split_documents(documents("read me", *texts), 0.05)
    assert characters(split.validation) >= 0.025 * 10_000


def test_a_single_document_is_cut_at_a_line_end() -> None:
    text = "".join(f"line {index:04d}\n" for index in range(1000))
    split = split_documents(documents(text), 0.05)
    assert split.train[0].text + split.validation[0].text == text
    assert split.train[0].text.endswith("\n")
    assert 0.04 < len(split.validation[0].text) / len(text) < 0.06


def test_files_folders_and_globs_are_read_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", "skipped.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = ["a.md", "b.txt", "deep/c.txt"]
    assert [document.text for document in read_documents([str(tmp_path)])] == everything
    assert [document.text for document in read_documents([str(tmp_path / "*.txt"), str(tmp_path)])] == [
        "b.txt",
        "a.md",
        "deep/c.txt",
    ]
    assert [document.text for document in read_documents([str(tmp_path / "skipped.bin")])] == ["skipped.bin"]
    monkeypatch.chdir(tmp_path)
    assert [document.text for document in read_documents(["**/*.txt"])] == ["b.txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file"),
        ("none-*.txt", "no such file"),
        ("bare", "no text files"),
        ("empty", "empty corpus"),
    ],
)
def test_sources_without_text_are_refused_by_name(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.txt").write_text(" \n")
    with pytest.raises(LabError, match=message) as caught:
        read_documents([str(tmp_path / source)])
    assert source in str(caught.value)


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(LabError, match=r"picture\.txt.*UTF-8"):
        read_documents([str(tmp_path / "picture.txt")])
