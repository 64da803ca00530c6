import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spectrim.lab.tables import TextTable, markdown_table


def printed(table: TextTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


WORD = st.text("abcdefgh.0", min_size=1, max_size=20)


@given(st.integers(1, 9), st.data(), st.integers(60, 120))
def test_a_table_fits_its_width_and_cuts_no_word(columns: int, data: st.DataObject, width: int) -> None:
    rows = data.draw(st.lists(st.lists(WORD, min_size=columns, max_size=columns), min_size=2, max_size=4))
    text = printed(TextTable(rows, title="some title", note="a note " * 30), width)
    assert max(map(len, text.splitlines())) <= width
    shown = text.split()
    for row in rows:
        assert all(cell in shown for cell in row)


@pytest.mark.parametrize(("width", "parts"), [(40, 2), (80, 1)])
def test_what_does_not_fit_is_in_a_table_of_its_own_below(width: int, parts: int) -> None:
    rows = [["recipe", "final loss", "difference to AdamW"], ["adamw+clip", "3" * 12, "-" * 16]]
    text = printed(TextTable(rows, bold="adamw+clip"), width)
    assert text.count("adamw+clip") == parts
    assert "difference" in text.split()


def test_words_may_wrap_at_spaces_and_numbers_never() -> None:
    text = printed(TextTable([["name", "rule", "number"], ["x", "clip then step " * 6, "12345"]], words=("rule",)), 50)
    assert len([line for line in text.splitlines() if "clip" in line]) > 1
    assert {"clip", "then", "step", "12345"} <= set(text.split())


def test_markdown_shows_names_as_code_and_numbers_to_the_right() -> None:
    assert markdown_table([["recipe", "loss"], ["muon", "3.5"]]) == [
        "| recipe | loss |",
        "|---|---:|",
        "| `muon` | 3.5 |",
    ]
