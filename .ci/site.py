"""Hooks of mkdocs.yml: pages of a folder that the navigation names by a star, and names in docstrings."""

import re
from pathlib import Path
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([\w.]*?)(\w+)</code>")


def on_config(config: Any) -> Any:
    """Put in the place of "FOLDER/*" the pages of that folder that stand nowhere else in the navigation."""
    named = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    config["nav"] = _filled(config["nav"], Path(config["docs_dir"]), named)
    return config


def _filled(entries: list[Any], docs: Path, named: set[str]) -> list[Any]:
    filled: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            filled.append({key: _filled(v, docs, named) if isinstance(v, list) else v for key, v in entry.items()})
        elif entry.endswith("/*"):
            pages = sorted(page.relative_to(docs).as_posix() for page in (docs / entry[:-2]).glob("*.md"))
            filled += [page for page in pages if page not in named]
        else:
            filled.append(entry)
    return filled


def on_page_content(html: str, **_: Any) -> str:
    """Show :func:`module.name` of a docstring as the name alone."""
    return ROLE.sub(r"<code>\2</code>", html)
