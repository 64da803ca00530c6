"""The rooms of the lab import in one direction, and a report loads only what it draws. Read from import statements."""

from collections.abc import Iterator

import pytest

from import_graph import MODULES, SOURCE, imported, reached

LAB = SOURCE / "spectrim" / "lab"

ROOMS = {
    "recipes": set(),
    "data": set(),
    "models": {"data"},
    "logging": {"models"},
    "training": {"recipes", "data", "models", "logging"},
    "planning": {"recipes", "models"},
    "reports": {"recipes", "models", "logging", "training"},
    "experiments": {"recipes", "data", "logging", "training", "reports"},
    "diagnosis": {"recipes", "data", "models", "logging", "training", "reports"},
    "bench": {"data", "models", "logging", "training"},
    "claims": {"recipes", "logging", "training", "reports", "experiments"},
    "cli": {
        "recipes",
        "data",
        "models",
        "logging",
        "training",
        "planning",
        "reports",
        "experiments",
        "diagnosis",
        "bench",
        "claims",
    },
}
"""What each may import, beside modules of the package ``lab`` itself."""


def room(name: str) -> str:
    """The room of a module; "" for one of the package itself."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and (LAB / parts[2]).is_dir() else ""


def crossings() -> Iterator[tuple[str, str]]:
    for name in MODULES:
        if name.startswith("spectrim.lab"):
            for other in imported(name):
                if other.startswith("spectrim.lab.") and room(name) != room(other) != "":
                    yield name, other


def test_every_room_is_in_the_table_and_no_room_of_it_is_missing() -> None:
    assert {path.parent.name for path in LAB.glob("*/__init__.py")} == ROOMS.keys()


def test_a_room_imports_only_what_the_table_allows() -> None:
    wrong = [
        f"{name} imports {other}" for name, other in crossings() if room(other) not in ROOMS.get(room(name), set())
    ]
    assert not wrong


def test_the_core_does_not_import_the_lab() -> None:
    core = [name for name in MODULES if not name.startswith("spectrim.lab") and name != "spectrim.cli"]
    assert not [f"{name} imports {other}" for name in core for other in imported(name) if "spectrim.lab" in other]


@pytest.mark.parametrize(
    ("page", "others"),
    [
        ("reports.page.comparison_page", ("sweep", "spectra.", "diagnosis")),
        ("reports.page.sweep_page", ("comparison", "spectra.", "diagnosis")),
        ("reports.spectra.spectrum_page", ("sweep", "comparison", "headline")),
    ],
)
def test_the_page_of_one_kind_of_result_loads_no_code_of_another(page: str, others: tuple[str, ...]) -> None:
    loaded = reached(f"spectrim.lab.{page}")
    assert "spectrim.lab.reports.page.html" in loaded
    assert not [name for name in sorted(loaded) for other in others if other in name]
