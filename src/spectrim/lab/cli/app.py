"""The application: every command under its name."""

import importlib
import importlib.util
from typing import Annotated

import typer

from spectrim.lab.cli.claims_command import claims_command
from spectrim.lab.cli.compare_command import compare_command
from spectrim.lab.cli.corpus_command import corpus_command
from spectrim.lab.cli.plan_command import plan_command
from spectrim.lab.cli.report_command import report_command
from spectrim.lab.cli.spectrum_command import spectrum_command
from spectrim.lab.cli.sweep_command import sweep_command
from spectrim.lab.cli.train_command import train_command

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Spectral control of LLM training: compare optimizer recipes on your own text.",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options of no command in particular."""
    if version:
        import spectrim

        print(spectrim.__version__)
        raise typer.Exit


app.command("compare")(compare_command)
app.command("train")(train_command)
app.command("corpus")(corpus_command)
app.command("plan")(plan_command)
app.command("sweep")(sweep_command)
app.command("report")(report_command)
app.command("spectrum")(spectrum_command)
app.command("claims")(claims_command)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    hidden=importlib.util.find_spec("spectrim.lab.cli.bench_command") is None,
)
def bench(context: typer.Context) -> None:
    """Measure the speed of operators and optimizers."""
    bench_app = importlib.import_module("spectrim.lab.cli.bench_command").bench_app  # late, for it needs torch
    raise typer.Exit(bench_app(context.args, prog_name="spectrim bench", standalone_mode=False) or 0)
