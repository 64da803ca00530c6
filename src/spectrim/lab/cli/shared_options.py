"""Options that several commands share and that are no settings of a run, and the printing of results."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.errors import LabError
from spectrim.lab.files import finite
from spectrim.lab.tables import PIPE_WIDTH, TextTable

FILES = "Files and output"

Name = Annotated[str, typer.Option(help="Name of a folder in --runs-dir.", rich_help_panel=FILES)]
RunsDir = Annotated[Path, typer.Option(help="Where comparisons and sweeps are kept.", rich_help_panel=FILES)]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with settings, such as the config.toml of a run.", rich_help_panel=FILES),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where tokens are cached. [dim]\\[default: ~/.cache/spectrim][/dim]", rich_help_panel=FILES),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Train with torch.compile. A run may be resumed with it or without.",
        rich_help_panel="Training",
    ),
]
TrustRecipes = Annotated[
    bool,
    typer.Option(
        "--trust-recipes",
        help="Import any module:Class that a file names; else only those named on this command line.",
        rich_help_panel=FILES,
    ),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every setting as TOML, and stop.", rich_help_panel=FILES)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.", rich_help_panel=FILES)]


def check_name(name: str) -> None:
    """Check that a name is a plain folder name."""
    if not name or name.startswith(".") or Path(name).name != name or not name.isprintable():
        raise LabError(f"--name {name!r}: expected a plain folder name; --runs-dir says where it lies")


def show(value: Any, as_json: bool, *tables: TextTable) -> None:
    """Print a value as JSON, or as tables."""
    if as_json:
        print(json.dumps(finite(value), indent=2, ensure_ascii=False))
    else:
        print_tables(*tables)


def print_tables(*tables: TextTable) -> None:
    """Print tables below each other, in the width of the terminal."""
    from rich.console import Console

    console = Console(emoji=False, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for index, table in enumerate(tables):
        console.print(*([""] if index else []), table, sep="\n")
