"""Markdown tables of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["number", "table"]


def table(lines: Iterable[Mapping[str, str]]) -> str:
    """A table of all columns that any line has; a line without one has a dash."""
    rows = list(lines)
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = [names, ["---", *["---:"] * (len(names) - 1)], *([row.get(name, "-") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def number(value: Any) -> str:
    """Three digits, or all before the point where there are more; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.3g}"
