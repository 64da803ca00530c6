"""``spectrim spectrum``: spectra of weights, gradients, momentum and noise, as pictures, numbers and words."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.cli.flags import configure, with_settings
from spectrim.lab.cli.shared_options import FILES, CacheDir, Json, show
from spectrim.lab.diagnosis.settings import SpectrumConfig, TextConfig

__all__ = ["spectrum_command"]

THEMES = {
    "What is measured": ("batches", "layers", "parameters", "thresholds", "seed", "memory"),
    "Text": tuple(f"data.{key}" for key in TextConfig.model_fields),
}


@with_settings(SpectrumConfig, THEMES)
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
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Show spectra of weights, gradients, momentum and gradient noise: spike and tail, noise structure, heavy tails.

    Writes pictures (PNG, SVG), spectrum.json, reading.md and report.html into a new folder. docs/spectrum.md says what
    each number means. A Hugging Face folder needs --data, or --batches 0.
    """
    config = configure(SpectrumConfig, None, given)
    from spectrim.lab.diagnosis.spectrum import check_out, default_out, spectrum, write_spectrum
    from spectrim.lab.logging.terminal import SpectrumProgress
    from spectrim.lab.reports.spectra.matrix_table import tables

    out = out or default_out(paths)
    check_out(out)
    with SpectrumProgress() as listener:
        summary = spectrum(paths, config, cache_dir=cache_dir, listener=listener)
        listener.say("drawing")
        write_spectrum(summary, out)
    show(summary, as_json, *tables(summary))
    print(f"written to {out}: report.html, reading.md, spectrum.json, pictures as PNG and SVG", file=sys.stderr)
