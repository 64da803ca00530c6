"""Writes a page's part as Markdown: tables, notes, and pictures in place of figures."""

from collections.abc import Mapping

from spectrim.lab.reports.page.html import Figure, Note, PagePart, Table
from spectrim.lab.tables import markdown_table

__all__ = ["markdown"]


FILES = "Every setting: `config.toml`; every number: `results.json`; every run: its own folder."


def markdown(part: PagePart, pictures: Mapping[str, str], *, files: str = FILES) -> str:
    """The part as Markdown.

    Args:
        part: as the page shows it. Folded tables, listings and figures without a picture are left out, and sections
            that have nothing else.
        pictures: files beside the summary, by the titles of the figures that they show.
        files: a last line that names the other files.
    """
    lines = [f"# {part.title}", "", f"**{part.headline}**", ""]
    for text in part.summary:
        lines += [text, ""]
    for section in part.sections:
        blocks = [(item, block) for item in section.items if (block := block_of(item, pictures))]
        if any(not isinstance(item, Note) for item, _ in blocks):
            lines += [f"## {section.title}", "", *(line for _, block in blocks for line in (*block, ""))]
    return "\n".join([*lines, files, ""])


def block_of(item: object, pictures: Mapping[str, str]) -> list[str]:
    if isinstance(item, Table) and not item.folded:
        return [f"**{item.caption}**", "", *markdown_table(item.rows)]
    if isinstance(item, Note):
        return [f"- {line}" for line in item.lines] if item.bullets else ["\n\n".join(item.lines)]
    if isinstance(item, Figure) and item.title in pictures:
        return [f"![{item.title}]({pictures[item.title]})"]
    return []
