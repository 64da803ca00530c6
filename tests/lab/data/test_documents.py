from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spectrim.lab.data import documents as module
from spectrim.lab.data.documents import Document, read_addresses, split_corpus, survey
from spectrim.lab.errors import LabError


def documents(*texts: str) -> list[Document]:
    return [Document(name=str(index), text=text) for index, text in enumerate(texts)]


def split(everything: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents."""
    [made] = split_corpus([survey(everything)], fraction)
    sides = list(made.sides(everything))
    return [each for side, each in sides if side == "train"], [each for side, each in sides if side == "validation"]


def characters(side: Sequence[Document]) -> int:
    return sum(len(document.text) for document in side)


def test_addresses_are_the_default_corpus() -> None:
    addresses = list(read_addresses())
    assert len(addresses) > 200
    assert characters(addresses) > 10_000_000
    assert 0.04 < characters(split(addresses, 0.05)[1]) / characters(addresses) < 0.06


@given(st.lists(st.text(min_size=1), min_size=2, max_size=30), st.floats(0.01, 0.6))
@example(["0", "00000"], 0.59375)
def test_no_document_is_on_both_sides_and_none_is_lost(texts: list[str], fraction: float) -> None:
    everything = documents(*texts)
    train, validation = split(everything, fraction)
    if len(set(texts)) > 1:
        assert not {document.text for document in train} & {document.text for document in validation}
        assert train
        assert validation
        assert sorted(document.name for document in train + validation) == sorted(
            document.name for document in everything
        )


@given(st.permutations([f"document {index} " * (index + 1) for index in range(12)]))
def test_the_split_depends_on_content_alone(texts: list[str]) -> None:
    expected = split(documents(*sorted(texts)), 0.1)[1]
    assert {each.text for each in split(documents(*texts), 0.1)[1]} == {each.text for each in expected}


def test_copies_of_a_document_land_on_the_same_side() -> None:
    _, validation = split(documents("a" * 50, "b" * 50, "a" * 50, "b" * 50), 0.5)
    assert len({document.text for document in validation}) == 1
    assert len(validation) == 2


def test_a_tiny_document_does_not_make_up_the_validation_set_alone() -> None:
    texts = [letter * 1000 for letter in "abcdefghij"]
    assert characters(split(documents("read me", *texts), 0.05)[1]) >= 0.025 * 10_000


def test_a_single_document_is_cut_at_a_line_end() -> None:
    text = "".join(f"line {index:04d}\n" for index in range(1000))
    [train], [validation] = split(documents(text), 0.05)
    assert train.text + validation.text == text
    assert train.text.endswith("\n")
    assert 0.04 < len(validation.text) / len(text) < 0.06


def test_more_documents_than_are_listed_are_split_without_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 50)
    everything = documents(*(f"document {index}" for index in range(4000)), "document 7")
    counted = survey(everything)
    assert counted.order is None
    assert counted.sizes is None
    assert counted.documents == 4001
    train, validation = split(everything, 0.05)
    assert len(train) + len(validation) == 4001
    assert not {each.text for each in train} & {each.text for each in validation}
    # Binomial: five standard deviations around a twentieth.
    assert abs(len(validation) - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5
    assert {each.name for each in split(everything[::-1], 0.05)[1]} == {each.name for each in validation}


def test_what_one_source_holds_back_the_others_hold_back() -> None:
    shared = [f"shared {index} " * 20 for index in range(10)]
    one = documents(*shared, *(f"one {index} " * 20 for index in range(10)))
    two = documents(*shared, *(f"two {index} " * 60 for index in range(10)))
    splits = split_corpus([survey(one), survey(two)], 0.3)
    sides: dict[str, set[str]] = {}
    for made, everything in zip(splits, (one, two), strict=True):
        assert {side for side, _ in made.sides(everything)} == {"train", "validation"}
        for side, document in made.sides(everything):
            sides.setdefault(document.text, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    for everything in (one, two):
        assert all(sides[document.text] == {"validation"} for document in split(everything, 0.3)[1])


def test_a_document_is_not_cut_in_one_source_and_whole_in_another() -> None:
    with pytest.raises(LabError, match="only document of its source"):
        split_corpus([survey(documents("a b c")), survey(documents("a b c", "d e f"))], 0.5)
