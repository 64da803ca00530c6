"""Spectra as tables: a row for every matrix, and the tables for the terminal."""

from typing import Any

from spectrim.lab.reports.words import reading_notes, reading_rows
from spectrim.lab.tables import TextTable, header_and_rows

__all__ = ["CAPTION", "WEIGHTS_CAPTION", "gradient_rows", "tables", "weight_rows"]

Matrix = dict[str, Any]

CAPTION = (
    "spike, of G, momentum: shares of the energy in the top 1.5% of the directions, of a batch's gradient, the mean "
    "gradient G and the momentum. overlap: of leading directions of noise N and G, on the side where it is larger. "
    "localised: max|N|/‖N‖₂, in brackets a Gaussian's. ± is a standard error."
)


WEIGHTS_CAPTION = "Frobenius norm, largest singular value, stable rank"


def tables(summary: dict[str, Any]) -> list[TextTable]:
    """The gradients of each subject with the reading below, and the weights of all side by side."""
    made = []
    for name, subject in summary["subjects"].items():
        if rows := gradient_rows(subject):
            made.append(TextTable(rows, title=name, note=CAPTION, words=("best tail",)))
        note = "\n".join(f"- {line}" for line in reading_notes(subject))
        made.append(TextTable(reading_rows(subject), title=f"{name}, over matrices", note=note, words=("verdict",)))
    return [*made, TextTable(weight_rows(summary), title="weights", note=WEIGHTS_CAPTION)]


def gradient_rows(subject: dict[str, Any]) -> list[list[str]]:
    """A header and a row for every matrix whose gradients were measured; empty without one."""
    return header_and_rows([gradient_row(each) for each in subject["matrices"].values() if each.get("gradient")])


def gradient_row(matrix: Matrix) -> dict[str, str]:
    mean, noise, momentum = matrix["mean_gradient"], matrix["noise"], matrix["momentum"]
    overlap = max(noise[side]["share"]["value"] for side in ("left", "right"))
    energy = mean["energy"]
    return {
        "matrix": place_of(matrix),
        "spike": f"{matrix['gradient']['spike_share']:.0%}",
        "of G": f"{mean['spike_share']:.0%}",
        "momentum": f"{momentum['spike_share']:.0%}" if momentum else "-",
        "‖G‖²/E‖N‖²": f"{energy['value'] / noise['energy']:.3f} ± {energy['error'] / noise['energy']:.3f}",
        "overlap": f"{overlap:.2f}",
        "localised": f"{noise['localisation']['value']:.2f} ({noise['gaussian_localisation']:.2f})",
        "best tail": matrix["tails"]["fits"][0]["model"],
    }


def weight_rows(summary: dict[str, Any]) -> list[list[str]]:
    """A header, and a row for every matrix of any subject."""
    subjects = summary["subjects"]
    matrices = {key: each for subject in subjects.values() for key, each in subject["matrices"].items()}
    return [
        ["matrix", *subjects],
        *(
            [place_of(each), *(weight_cell(subject["matrices"].get(key)) for subject in subjects.values())]
            for key, each in matrices.items()
        ),
    ]


def weight_cell(matrix: Matrix | None) -> str:
    if matrix is None:
        return "-"
    weight = matrix["weight"]
    rank = "-" if weight["stable_rank"] is None else f"{weight['stable_rank']:.1f}"
    return f"{weight['norm']:.3g}, {weight['spectral_norm']:.3g}, {rank}"


def place_of(matrix: Matrix) -> str:
    """The layer and the kind of a matrix."""
    return str(matrix["kind"] if matrix["layer"] is None else f"{matrix['layer']}: {matrix['kind']}")
