"""Pictures with a row for each matrix: what the spike holds, how the noise lies, norms of the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.lab.reports.plots import COLOURS, look
from spectrim.lab.reports.spectra.panels import INK, QUANTITIES, QUIET, Summary, describe, measured, place_of

__all__ = ["norms_of_weights", "row_size", "rows_size", "shares", "structure"]

BLUE, RED, GREEN, _, ORANGE, _, _ = COLOURS

Series = Mapping[tuple[str, str, str], Sequence[float | None]]
"""Values of every matrix by label, colour and marker."""


def shares(figure: Any, name: str, subject: Summary) -> None:
    """How much of what the spike holds, a row for each matrix."""
    matrices = measured(subject)
    each = list(matrices.values())
    marks = {"gradient": "o", "mean_gradient": "s", "momentum": "D", "weight": "|"}
    held = {
        (QUANTITIES[key][0], QUANTITIES[key][1], mark): [(one.get(key) or {}).get("spike_share") for one in each]
        for key, mark in marks.items()
    }
    second = {
        ("of its sum", RED, "o"): [one["second_moment"]["share"] for one in each],
        ("in the median entry", BLUE, "s"): [one["second_moment"]["median_share"] for one in each],
    }
    contraction = [one["second_moment"]["contraction"] for one in each]
    axes = dots(
        figure, list(map(place_of, matrices.values())), [
            ("spike's share of the energy", held),
            ("spike's share of E[g²]", second),
            ("tail's update, against none of the spike", {("", GREEN, "o"): contraction}),
        ], f"What the spike holds, {describe(name, subject)}",
    )  # fmt: skip
    for panel in axes:
        panel.set_xlim(0, 1.02)


def structure(figure: Any, name: str, subject: Summary) -> None:
    """Overlap of signal and noise, and localisation, a row for each matrix."""
    matrices = measured(subject)
    noises = [each["noise"] for each in matrices.values()]
    overlaps = {
        ("left", BLUE, "o"): [each["left"]["share"]["value"] for each in noises],
        ("right", RED, "s"): [each["right"]["share"]["value"] for each in noises],
        ("by chance", QUIET, "|"): [each["left"]["expected"] for each in noises],
    }
    recurring = {
        ("left", BLUE, "o"): [each["recurring_left"]["share"]["value"] for each in noises],
        ("right", RED, "s"): [each["recurring_right"]["share"]["value"] for each in noises],
        ("by chance", QUIET, "|"): [each["recurring_left"]["expected"] for each in noises],
    }
    localised = {
        ("noise of one batch", ORANGE, "o"): [each["localisation"]["value"] for each in noises],
        ("Gaussian", QUIET, "|"): [each["gaussian_localisation"] for each in noises],
    }
    axes = dots(
        figure, list(map(place_of, matrices.values())), [
            ("overlap of N's leading directions with G's", overlaps),
            ("overlap of N with N of another batch", recurring),
            ("localisation max|N| / ‖N‖₂", localised),
        ], f"Structure of the noise, {describe(name, subject)}",
    )  # fmt: skip
    for panel in axes[:2]:
        panel.set_xlim(-0.02, 1.02)
    axes[2].set_xlim(0, 1.08 * max(max(values) for values in localised.values()))


def norms_of_weights(figure: Any, subjects: Summary) -> None:
    """Norms and stable ranks of the weights, a row for each matrix."""
    matrices = {key: each for subject in subjects.values() for key, each in subject["matrices"].items()}
    markers = "osD^v<>"
    panels: list[tuple[str, Series]] = []
    for key, label in (
        ("norm", "Frobenius norm"), ("spectral_norm", "largest singular value"), ("stable_rank", "stable rank"),
    ):  # fmt: skip
        series: Series = {
            (name, look(index)["color"], markers[index % len(markers)]): [
                (subject["matrices"].get(matrix) or {"weight": {}})["weight"].get(key) for matrix in matrices
            ]
            for index, (name, subject) in enumerate(subjects.items())
        }
        panels.append((label, series))
    axes = dots(figure, list(map(place_of, matrices.values())), panels, "Norms of the weights")
    for panel in axes:
        panel.set_xlim(left=0)
        if panel is not axes[0] and panel.get_legend():
            panel.get_legend().remove()


def row_size(subject: Summary) -> tuple[float, float] | None:
    """Of a picture of the matrices whose gradients were measured; None where there are none."""
    rows = len(measured(subject))
    return rows_size(rows) if rows else None


def rows_size(rows: int) -> tuple[float, float]:
    """Width and height of a picture with so many rows, in inches."""
    return 10.0, 1.7 + 0.24 * rows


def dots(figure: Any, names: Sequence[str], panels: Sequence[tuple[str, Series]], title: str) -> Any:
    """Panels side by side with one row for each matrix; a series is (label, colour, marker) -> values."""
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rows = range(len(names))
    for panel, (x, series) in zip(axes, panels, strict=True):
        for (label, colour, marker), values in series.items():
            known = [(value, row) for value, row in zip(values, rows, strict=True) if value is not None]
            if known:
                panel.plot(
                    *zip(*known, strict=True), color=colour, marker=marker, linestyle="", label=label, markersize=5.5,
                    fillstyle="none" if marker in "|sD" else "full", alpha=0.95,
                )  # fmt: skip
        panel.set_xlabel(x, color=INK, fontsize=9.5)
        panel.grid(axis="y", color="0.9", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8.5, colors=INK)
        if len(series) > 1:
            panel.legend(
                frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.3,
                ncols=2 if len(series) > 3 else 1, columnspacing=0.8, borderaxespad=0.2,
            )  # fmt: skip
    axes[0].set_yticks(list(rows), labels=list(names), fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return axes
