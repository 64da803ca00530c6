"""Tables of text with a header and named rows, as Markdown and for a terminal of any width."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PIPE_WIDTH", "TextTable", "header_and_rows", "markdown_table", "value_of"]

PIPE_WIDTH = 160
"""The width of output to a file or a pipe."""

GAP = 2


def header_and_rows(lines: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The rows of a table from lines by column, its header first; empty without lines."""
    return [[*lines[0]], *([*line.values()] for line in lines)] if lines else []


def markdown_table(rows: Sequence[Sequence[str]], *, words: bool = False) -> list[str]:
    """A table in Markdown: first cells are code and others stand at the right, or, with ``words``, all hold text."""
    header, *rest = rows
    if words:
        rest = [[cell.replace("|", "\\|") for cell in row] for row in rest]
    else:
        rest = [[f"`{row[0]}`", *row[1:]] for row in rest]
    columns = "---|" * len(header) if words else "---|" + "---:|" * (len(header) - 1)
    return [f"| {' | '.join(header)} |", f"|{columns}", *(f"| {' | '.join(row)} |" for row in rest)]


def value_of(entry: Any, key: str) -> Any:
    """The value of a nested dictionary by its dotted key, None if it is missing."""
    for part in key.split("."):
        entry = entry and entry.get(part)
    return entry


class TextTable:
    """A table that rich prints. Columns that do not fit go into a further table below; no word is cut."""

    def __init__(
        self,
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        note: str = "",
        words: Collection[str] = (),
        bold: str | None = None,
    ) -> None:
        """``words`` are the headings of further columns that are aligned to the left and may be wrapped; ``bold`` is
        the first cell of the highlighted row.
        """
        self.header, *self.rows = ([*row] for row in rows)
        self.title, self.note, self.words, self.bold = title, note, words, bold

    def widths(self, limit: int) -> list[int]:
        """The width of every column: of its widest cell, or of words that may be wrapped, at most ``limit``."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        widths = []
        for place, (heading, cells) in enumerate(zip(self.header, columns, strict=True)):
            widest = max([len(word) for word in heading.split()] + [len(cell) for cell in cells], default=0)
            widths.append(min(widest, limit) if place == 0 or heading in self.words else widest)
        return widths

    def blocks(self, width: int) -> Iterator[list[int]]:
        """The columns of each table, by their places; the first column begins every one."""
        widths = self.widths(max(24, (width - GAP) // 2))
        block, room = [0], width - widths[0]
        for place in range(1, len(widths)):
            if len(block) > 1 and widths[place] + GAP > room:
                yield block
                block, room = [0], width - widths[0]
            block.append(place)
            room -= widths[place] + GAP
        yield block

    def __rich_console__(self, _: Any, options: Any) -> Iterator[Any]:
        """The title, the tables and the note, for rich."""
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic")
        for index, block in enumerate(self.blocks(options.max_width)):
            if index:
                yield ""
            yield self._part(block)
        if self.note:
            yield Text(self.note, style="dim")

    def _part(self, block: Sequence[int]) -> "Table":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for place in block:
            wraps = place == 0 or self.header[place] in self.words
            heading = Text("\n".join(self.header[place].split()))
            table.add_column(
                heading, justify="left" if wraps else "right", no_wrap=not wraps, vertical="top", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*(Text(row[place]) for place in block), style="bold" if row[0] == self.bold else None)
        return table
