"""Spectra as a table: the cells of every matrix, and what the terminal shows."""

from typing import Any

from spectrim.lab.spectrum_reading import reading

__all__ = ["CAPTION", "COLUMNS", "row", "tables"]

COLUMNS = (
    "matrix",
    "spike",
    "of G",
    "momentum",
    "‖G‖²/E‖N‖²",
    "overlap",
    "localised",
    "best tail",
    "‖W‖₂",
)


CAPTION = (
    "spike, of G, momentum: shares of the energy in the top 1.5% of the directions, of a batch's gradient, the mean "
    "gradient G and the momentum. overlap: of leading directions of noise N and G, on the side where it is larger. "
    "localised: max|N|/‖N‖₂, in brackets a Gaussian's. ± is a standard error."
)


def tables(summary: dict[str, Any]) -> Any:
    """A table for each subject, and the reading below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for name, subject in summary["subjects"].items():
        table = Table(title=Text(name), title_justify="left", caption=Text(CAPTION), caption_justify="left")
        for column in COLUMNS:
            words = column in ("matrix", "best tail")
            table.add_column(column, justify="left" if words else "right", no_wrap=column == "matrix")
        for each in subject["matrices"].values():
            table.add_row(*map(Text, row(each)))
        parts += [table, *(Text(f"- {line.replace('`', '')}") for line in reading(subject)), Text("")]
    return Group(*parts)


def row(matrix: dict[str, Any]) -> list[str]:
    """The cells of a matrix; those of gradients are empty where none were measured."""
    place = matrix["kind"] if matrix["layer"] is None else f"{matrix['layer']}: {matrix['kind']}"
    top = f"{matrix['weight']['spectral_norm']:.3g}"
    if not matrix.get("gradient"):
        return [place, *["-"] * (len(COLUMNS) - 2), top]
    mean, noise = matrix["mean_gradient"], matrix["noise"]
    momentum = matrix["momentum"]
    overlap = max(noise[side]["share"]["value"] for side in ("left", "right"))
    return [
        place,
        f"{matrix['gradient']['spike_share']:.0%}",
        f"{mean['spike_share']:.0%}",
        f"{momentum['spike_share']:.0%}" if momentum else "-",
        f"{mean['energy']['value'] / noise['energy']:.3f} ± {mean['energy']['error'] / noise['energy']:.3f}",
        f"{overlap:.2f}",
        f"{noise['localisation']['value']:.2f} ({noise['gaussian_localisation']:.2f})",
        matrix["tails"]["fits"][0]["model"],
        top,
    ]
