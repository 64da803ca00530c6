"""``spectrim spectrum``: spectra of weights, gradients, momentum and noise, as pictures, numbers and words."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from spectrim.lab.cli.flags import show
from spectrim.lab.errors import LabError

__all__ = ["spectrum_command"]


def spectrum_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Folders of runs or of comparisons, checkpoints of runs, or Hugging Face folders of weights.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="A new folder; default: PATH-spectrum, next to the one PATH.")
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Batches over which mean and noise are taken, at least 4; 0 shows weights alone.")
    ] = 32,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to look at, such as 0,5,11. Default: the first, a middle and the last."),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Matrices to look at, by a pattern of names such as '*.q_proj.weight'; repeatable."
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="Also show what spectral soft clipping of the gradient at this c leaves; repeatable."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE[@WEIGHT]", help="Text for the gradients; a run's own unless given. See compare --help."
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of jsonl, parquet and data sets with the text.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json or Hugging Face folder.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch; a run's own unless given.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence; a run's own unless given.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Draws the batches; default: those that the run would have been trained on next."),
    ] = None,
    memory: Annotated[
        float,
        typer.Option(help="Gigabytes of gradients to hold at once; what does not fit is measured in further rounds."),
    ] = 2.0,
    cache_dir: Annotated[Path | None, typer.Option(help="Where tokens are cached.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print spectrum.json on stdout instead of a table.")] = False,
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
    for flag, value in (("--batch-size", batch_size), ("--sequence-length", sequence_length)):
        if value is not None and value < (2 if flag == "--sequence-length" else 1):
            raise LabError(f"{flag} {value}: expected a whole number above {1 if flag == '--sequence-length' else 0}")
    options = SpectrumOptions(
        batches=batches,
        layers=parse_layers(layers),
        parameters=tuple(parameters or ()),
        thresholds=tuple(threshold or ()),
        seed=seed,
        memory=memory * 1e9,
        text=TextOptions(
            sources=tuple(data or ()),
            text_column=text_column,
            tokenizer=tokenizer,
            batch_size=batch_size,
            sequence_length=sequence_length,
        ),
    )
    with SpectrumProgress() as listener:
        summary = spectrum(paths, options, cache_dir=cache_dir, listener=listener)
        listener.say("drawing")
        write_spectrum(summary, out)
    show(summary, as_json, lambda: tables(summary))
    print(f"written to {out}: report.html, reading.md, spectrum.json, pictures as PNG and SVG", file=sys.stderr)


def parse_layers(text: str | None) -> tuple[int, ...]:
    """Numbers of layers, separated by commas."""
    try:
        layers = () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = (-1,)
    if any(layer < 0 for layer in layers):
        raise LabError(f"--layers {text!r}: expected numbers of layers from 0, separated by commas, such as 0,5,11")
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
