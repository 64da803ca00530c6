"""The packages of the core import in one direction. Read from import statements; the lab has a test of its own."""

from collections.abc import Mapping

import pytest

from import_graph import MODULES, imported

PACKAGES = {
    "kernels": set(),
    "operators": {"kernels"},
    "distributed": {"kernels", "operators"},
    "optim": {"kernels", "operators", "distributed"},
    "monitor": {"operators", "distributed", "optim"},
}
"""What each package of spectrim may import."""

OPTIM = {
    "grouping": set(),
    "directions": set(),
    "memory": set(),
    "spectral": {"grouping", "directions", "memory"},
    "rules": {"grouping", "directions", "spectral"},
    "stepping": {"grouping", "memory", "spectral", "rules"},
    "sharded": {"grouping", "spectral", "rules", "stepping"},
    "screening": {"stepping", "sharded"},
    "state": {"grouping", "directions", "rules", "stepping", "sharded"},
    "gradients": {"grouping", "rules", "spectral", "stepping", "sharded", "screening"},
    "describe": {"grouping"},
    "screened": {"grouping", "rules", "stepping", "sharded", "screening"},
    "optimizer": {"gradients", "grouping", "rules", "stepping", "sharded", "screening", "state", "screened"},
    "recipes": {"grouping", "directions", "spectral", "rules", "optimizer"},
    "recipe_names": {"grouping", "recipes", "optimizer"},
    "wrapping": {"grouping", "rules", "spectral", "stepping", "sharded", "screening", "screened", "state", "optimizer"},
}
"""What each package of optim, or module beside them, may import; for types alone, as an operator's method that takes
entries, it may name any."""


def wrong(parent: str, table: Mapping[str, set[str]]) -> list[str]:
    """The imports between the parts of a package that its table does not allow."""
    depth = len(parent.split("."))
    found = []
    for name in MODULES:
        parts = name.split(".")
        if name.startswith(f"{parent}.") and parts[depth] in table:
            for other in imported(name, for_types=False):
                part = other.removeprefix(f"{parent}.").split(".")[0] if other.startswith(f"{parent}.") else ""
                if part not in {"", parts[depth], *table[parts[depth]]}:
                    found.append(f"{name} imports {other}")
    return found


@pytest.mark.parametrize(("parent", "table"), [("spectrim", PACKAGES), ("spectrim.optim", OPTIM)])
def test_packages_import_in_one_direction(parent: str, table: Mapping[str, set[str]]) -> None:
    assert not wrong(parent, table)


def test_every_part_of_optim_is_in_the_table() -> None:
    parts = {name.split(".")[2] for name in MODULES if name.startswith("spectrim.optim.")}
    assert parts == OPTIM.keys()


def test_the_tables_have_no_circles() -> None:
    for table in (PACKAGES, OPTIM):
        done: set[str] = set()
        while left := [part for part in table if part not in done]:
            ready = {part for part in left if table[part] <= done}
            assert ready, left
            done |= ready


def test_triton_code_is_imported_by_its_eager_forms_alone() -> None:
    device = "spectrim.kernels.device"
    outside = [name for name in MODULES if not name.startswith("spectrim.kernels")]
    assert not [f"{name} imports {other}" for name in outside for other in imported(name) if other.startswith(device)]
