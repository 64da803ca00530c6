"""The application: every command under its name."""

from importlib import import_module
from typing import Annotated

import typer

import spectrim
from spectrim.cli import ABOUT, COMMANDS

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=ABOUT,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options that belong to no command."""
    if version:
        print(spectrim.__version__)
        raise typer.Exit


for name, summary in COMMANDS.items():
    command = getattr(import_module(f"spectrim.lab.cli.{name}_command"), f"{name}_command")
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name, short_help=summary)
    else:
        app.command(name, short_help=summary)(command)
