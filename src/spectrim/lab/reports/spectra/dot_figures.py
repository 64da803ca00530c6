"""The figures of a report page on spectra that draw a row of dots for every matrix."""

from collections.abc import Callable, Mapping
from typing import Any

from spectrim.lab.logging.monitor_log import short_names
from spectrim.lab.reports.page.figures import colour, layout, scatter, shown
from spectrim.lab.reports.page.html import Figure, Table

__all__ = ["GREY", "KINDS", "Matrix", "Subjects", "names_of", "spike_figures", "structure_figures", "weight_figures"]

Subjects = Mapping[str, dict[str, Any]]
Matrix = dict[str, Any]

GREY = "#8a8a8a"

KINDS = {
    "gradient": ("gradient of one batch", "#D55E00", "solid"),
    "mean_gradient": ("mean gradient", "#0072B2", "solid"),
    "noise": ("noise of one batch", "#E69F00", "dash"),
    "momentum": ("momentum", "#009E73", "dashdot"),
    "weight": ("weights", "#CC79A7", "dot"),
}
"""Kinds of spectra: name, and colour and dashes for figures that show several kinds."""


def names_of(subjects: Subjects, having: str = "weight") -> list[str]:
    """Names of the matrices that have this measurement in any subject, in the models' order."""
    return list(
        dict.fromkeys(
            name for subject in subjects.values() for name, each in subject["matrices"].items() if each.get(having)
        )
    )


def dot_figure(
    subjects: Subjects,
    title: str,
    x: str,
    series: Mapping[str, Callable[[Matrix], float | None]],
    *,
    having: str = "gradient",
    reference: tuple[str, Callable[[Matrix], float]] | None = None,
    share: bool = False,
    note: str = "",
    small: bool = False,
) -> Figure | None:
    """A row for each matrix, and on it a dot for every subject and series; ``reference`` is a tick for all subjects.

    None if no subject has the measurement.
    """
    names = names_of(subjects, having)
    if not names:
        return None
    short = short_names(names)
    traces = []
    symbols = ("circle", "square-open", "diamond-open", "x-thin")
    rows = [
        [
            "matrix",
            *(
                f"{name}: {label}" if len(subjects) > 1 and label else label or name
                for name in subjects
                for label in series
            ),
        ]
    ]
    table = {name: [short[name]] for name in names}
    words = []
    for index, (subject_name, subject) in enumerate(subjects.items()):
        stroke = {"color": colour(index)}
        for (label, read), symbol in zip(series.items(), symbols, strict=False):
            found = {
                name: read(subject["matrices"][name])
                for name in names
                if (subject["matrices"].get(name) or {}).get(having)
            }
            known = {name: value for name, value in found.items() if value is not None}
            marker = {**stroke, "symbol": symbol, "size": 9, "line": {**stroke, "width": 1.8}}
            traces.append(
                scatter(
                    index,
                    f"{subject_name}: {label}" if label else subject_name,
                    list(known.values()),
                    [short[name] for name in known],
                    hover="%{y}: %{x:.3g}",
                    mode="markers",
                    marker=marker,
                )
            )
            for name in names:
                table[name].append(f"{known[name]:.3g}" if name in known else "-")
            if known:
                of = f"{subject_name}, {label}" if label else subject_name
                words.append(f"{of}: from {min(known.values()):.3g} to {max(known.values()):.3g}.")
    if reference is not None:
        label, at = reference
        marks = {
            name: at(next(each["matrices"][name] for each in subjects.values() if name in each["matrices"]))
            for name in names
        }
        marker = {"symbol": "line-ns", "size": 12, "color": GREY, "line": {"width": 2, "color": GREY}}
        rows_at, hover = [short[name] for name in names], f"{shown(label)}: %{{x:.3g}}<extra></extra>"
        traces.append(scatter(None, label, list(marks.values()), rows_at, hover=hover, mode="markers", marker=marker))
        rows[0].append(label)
        for name in names:
            table[name].append(f"{marks[name]:.3g}")
    axis: dict[str, Any] = {"title": x, "rangemode": "tozero"}
    if share:
        axis |= {"range": [-0.01, 1.03], "tickformat": ".0%"}
    shape = layout(x=axis, bars=True, hovermode="closest", margin={"l": 8, "r": 16, "t": 16, "b": 8})
    shape["yaxis"] |= {
        **{"showgrid": True, "categoryorder": "array", "categoryarray": [short[name] for name in names]},
    }
    return Figure(
        title=title,
        alt=f"Dots for every matrix: {title}. {' '.join(words)}",
        drawing={"data": traces, "layout": shape},
        numbers=Table(caption=title, rows=[*rows, *table.values()]),
        note=note,
        small=small,
        height=90 + 20 * len(names),
    )


def spike_figures(subjects: Subjects) -> list[Figure]:
    """The spike's share of the energy, and of Adam's second moment."""
    made = [
        dot_figure(
            subjects,
            "Share of the energy in the top 1.5% of the singular directions",
            "share of the energy",
            {
                KINDS[kind][0]: lambda each, kind=kind: (each.get(kind) or {}).get("spike_share")  # type: ignore[misc]
                for kind in ("gradient", "mean_gradient", "momentum", "weight")
            },
            share=True,
            note="Discs: the gradient of one batch. Squares: the mean gradient. Diamonds: the optimizer's momentum. "
            "Crosses: the weights.",
        ),
        dot_figure(
            subjects,
            "The spike in Adam's second moment",
            "share",
            {
                "of the sum of E[g²]": lambda each: each["second_moment"]["share"],
                "in the median entry": lambda each: each["second_moment"]["median_share"],
                "tail's update": lambda each: each["second_moment"]["contraction"],
            },
            share=True,
            note="Discs: what the spike holds of the sum of E[g²] over entries. Squares: in the median entry. "
            "Diamonds: the tail's update, as a share of what it would be without a spike.",
        ),
    ]
    return [figure for figure in made if figure]


def structure_figures(subjects: Subjects) -> list[Figure]:
    """Overlaps of the noise with the signal and with itself, and its localisation."""
    made = [
        dot_figure(
            subjects,
            f"Overlap of the noise's leading directions with those of {other}",
            "‖UᵀU'‖²/k",
            {
                "left": lambda each, key=key: each["noise"][f"{key}left"]["share"]["value"],  # type: ignore[misc]
                "right": lambda each, key=key: each["noise"][f"{key}right"]["share"]["value"],  # type: ignore[misc]
            },
            reference=("by chance, left", lambda each, key=key: each["noise"][f"{key}left"]["expected"]),  # type: ignore[misc]
            having="noise",
            share=True,
            note="Discs: left directions (outputs). Squares: right directions (inputs). Ticks: by chance.",
        )
        for other, key in (("the mean gradient", ""), ("the noise of another batch", "recurring_"))
    ]
    localised = dot_figure(
        subjects,
        "Localisation of the noise, max|N|/‖N‖₂",
        "localisation",
        {"noise": lambda each: each["noise"]["localisation"]["value"]},
        reference=("Gaussian of this shape", lambda each: each["noise"]["gaussian_localisation"]),
        having="noise",
        note="1 would be noise on a single entry. Ticks: about what Gaussian entries have.",
    )
    return [figure for figure in (*made, localised) if figure]


def weight_figures(subjects: Subjects) -> list[Figure]:
    """Norms and stable ranks of the weights."""
    names = {"norm": "Frobenius norm", "spectral_norm": "Largest singular value", "stable_rank": "Stable rank"}
    made = []
    for key, name in names.items():
        read = lambda each, key=key: each["weight"][key]  # noqa: E731
        made.append(dot_figure(subjects, f"{name} of the weights", name.lower(), {"": read}, having="weight"))
    return [figure for figure in made if figure]
