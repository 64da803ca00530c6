"""``spectrim spectrum``: spectra of weights, gradients, momentum and noise, as pictures, numbers and words."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

from spectrim.lab.cli.flags import configure, parse_numbers, with_settings
from spectrim.lab.cli.shared_options import FILES, CacheDir, Json, show
from spectrim.lab.config import SharedConfig
from spectrim.lab.errors import LabError

__all__ = ["spectrum_command"]

TEXT = ("sources", "text_column", "tokenizer", "batch_size", "sequence_length")
"""Settings of the table data that may differ from those of the run."""

MEASURED = "What is measured"


@with_settings(SharedConfig, only=[f"data.{key}" for key in TEXT], default="a run's own")
def spectrum_command(
    given: dict[str, Any],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Folders of runs or of comparisons, checkpoints of runs, or Hugging Face folders of weights.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A new folder. [dim]\\[default: PATH-spectrum, next to PATH][/dim]", rich_help_panel=FILES),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            help="Batches over which mean and noise are taken, at least 4; 0 shows weights alone.",
            rich_help_panel=MEASURED,
        ),
    ] = 32,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Layers to look at. [dim]\\[default: the first, a middle and the last][/dim]",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Matrices to look at, by a pattern of names such as '*.q_proj.weight'. Repeatable. "
            "[dim]\\[default: all of the layers][/dim]",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            help="Also show what spectral soft clipping of the gradient at this c leaves. Repeatable. "
            "[dim]\\[default: none][/dim]",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Draws the batches. [dim]\\[default: those that the run would have been trained on next][/dim]",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    memory: Annotated[
        float,
        typer.Option(
            help="Gigabytes of gradients to hold at once; what does not fit is measured in further rounds.",
            rich_help_panel=MEASURED,
        ),
    ] = 2.0,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Show spectra of weights, gradients, momentum and gradient noise: spike and tail, noise structure, heavy tails.

    Writes pictures (PNG, SVG), spectrum.json, reading.md and report.html into a new folder. docs/spectrum.md says what
    each number means. A Hugging Face folder needs --data, or --batches 0.
    """
    from spectrim.lab.diagnosis.spectrum import SpectrumOptions, check_out, default_out, spectrum, write_spectrum
    from spectrim.lab.diagnosis.targets import TextOptions
    from spectrim.lab.reports.spectra.matrix_table import tables

    out = out or default_out(paths)
    check_out(out)
    configure(SharedConfig, None, given)  # refuses values out of range
    text = {key: given[f"data.{key}"] for key in TEXT if f"data.{key}" in given}
    options = SpectrumOptions(
        batches=batches,
        layers=parse_layers(layers),
        parameters=tuple(parameters or ()),
        thresholds=tuple(threshold or ()),
        seed=seed,
        memory=memory * 1e9,
        text=TextOptions(**text | {"sources": tuple(text.get("sources", ()))}),
    )
    with SpectrumProgress() as listener:
        summary = spectrum(paths, options, cache_dir=cache_dir, listener=listener)
        listener.say("drawing")
        write_spectrum(summary, out)
    show(summary, as_json, lambda: tables(summary))
    print(f"written to {out}: report.html, reading.md, spectrum.json, pictures as PNG and SVG", file=sys.stderr)


def parse_layers(text: str | None) -> tuple[int, ...]:
    """Numbers of layers, separated by commas."""
    layers = () if text is None else tuple(parse_numbers("--layers", text))
    if any(layer < 0 for layer in layers):
        raise LabError(f"--layers {text!r}: expected numbers of layers from 0, such as 0,5,11")
    return layers


class SpectrumProgress:
    """Shows on stderr what is being done: a bar on a terminal, otherwise a line for each subject."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("reading", total=None)

    def say(self, what: str) -> None:
        """Name what is being done."""
        self._bar.update(self._task, description=what)

    def subject_started(self, name: str, batches: int, matrices: int) -> None:
        """Begin a bar of gradients and matrices."""
        self._bar.reset(self._task, total=batches + 4 * matrices, description=f"{name}: gradients")
        if not self._console.is_terminal:
            line = f"{name}: {batches} batches, {matrices} matrices"
            self._console.print(line, markup=False, highlight=False)

    def batch_done(self) -> None:
        """Move the bar by one batch."""
        self._bar.advance(self._task)

    def matrix_done(self) -> None:
        """Move the bar by one matrix, which takes about as long as four batches of a small model."""
        self._bar.advance(self._task, 4)

    def __enter__(self) -> "SpectrumProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
