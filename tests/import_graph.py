"""Which module of spectrim imports which, read from import statements; nothing is imported."""

import ast
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in (SOURCE / "spectrim").rglob("*.py")}


@cache
def imported(name: str, *, for_types: bool = True) -> frozenset[str]:
    """The modules of spectrim that a module imports, in functions too.

    Args:
        for_types: count what only a type checker imports.
    """
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    unread = set() if for_types else {child for node in ast.walk(tree) if _is_for_types(node) for child in node.body}
    found = set()
    for statement in ast.walk(tree):
        if statement in unread:
            continue
        if isinstance(statement, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
            base = ".".join([*above, *filter(None, [statement.module])])
            whole = {f"{base}.{alias.name}" for alias in statement.names}
            found |= (whole & MODULES.keys()) or {base}
        elif isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
    return frozenset(found & MODULES.keys())


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def reached(name: str) -> set[str]:
    """Every module that the import of one may lead to."""
    found, waiting = set(), [name]
    while waiting:
        if (current := waiting.pop()) not in found:
            found.add(current)
            waiting += imported(current)
    return found
