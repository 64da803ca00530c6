"""The figures of a report page on spectra that draw a row of dots for every matrix."""

from collections.abc import Mapping
from typing import Any

from spectrim.lab.logging.monitor_log import short_names
from spectrim.lab.reports.page.figures import colour, layout, scatter, shown
from spectrim.lab.reports.page.html import Figure, Table
from spectrim.lab.tables import value_of

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


SYMBOLS = ("circle", "square-open", "diamond-open", "x-thin")
"""Plotly's symbols of the series, in their order."""


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
    series: Mapping[str, str],
    *,
    having: str = "gradient",
    reference: tuple[str, str] | None = None,
    share: bool = False,
    note: str = "",
) -> Figure | None:
    """A row for each matrix, and on it a dot for every subject and series; ``reference`` is a tick for all subjects.

    Series and reference are labels with dotted keys. None if no subject has the measurement.
    """
    names = names_of(subjects, having)
    if not names:
        return None
    short = short_names(names)
    traces, words = [], []
    columns = [["matrix", *short.values()]]
    every: dict[str, Matrix] = {}

    def draw(index: int | None, name: str, heading: str, known: Mapping[str, float], marker: Any, hover: str) -> None:
        x, y = list(known.values()), [short[each] for each in known]
        traces.append(scatter(index, name, x, y, hover=hover, mode="markers", marker=marker))
        columns.append([heading, *(f"{known[each]:.3g}" if each in known else "-" for each in names)])

    for index, (model, subject) in enumerate(subjects.items()):
        measured = {name: each for name in names if (each := subject["matrices"].get(name) or {}).get(having)}
        every = measured | every
        for (label, key), symbol in zip(series.items(), SYMBOLS, strict=False):
            known = {name: value for name, each in measured.items() if (value := value_of(each, key)) is not None}
            stroke = {"color": colour(index)}
            marker = {**stroke, "symbol": symbol, "size": 9, "line": {**stroke, "width": 1.8}}
            whole = f"{model}: {label}" if label else model
            draw(index, whole, whole if len(subjects) > 1 else label or model, known, marker, "%{y}: %{x:.3g}")
            if known:
                of = f"{model}, {label}" if label else model
                words.append(f"{of}: from {min(known.values()):.3g} to {max(known.values()):.3g}.")
    if reference is not None:
        label, key = reference
        marker = {"symbol": "line-ns", "size": 12, "color": GREY, "line": {"width": 2, "color": GREY}}
        hover = f"{shown(label)}: %{{x:.3g}}<extra></extra>"
        draw(None, label, label, {name: value_of(every[name], key) for name in names}, marker, hover)
    axis = {"title": x, "rangemode": "tozero", **({"range": [-0.01, 1.03], "tickformat": ".0%"} if share else {})}
    shape = layout(x=axis, bars=True, hovermode="closest")
    shape["yaxis"] |= {"showgrid": True, "categoryorder": "array", "categoryarray": list(short.values())}
    return Figure(
        title=title,
        alt=f"Dots for every matrix: {title}. {' '.join(words)}",
        drawing={"data": traces, "layout": shape},
        numbers=Table(caption=title, rows=list(zip(*columns, strict=True))),
        note=note,
        height=90 + 20 * len(names),
    )


def spike_figures(subjects: Subjects) -> list[Figure | None]:
    """The spike's share of the energy, and of Adam's second moment."""
    return [
        dot_figure(
            subjects,
            "Share of the energy in the top 1.5% of the singular directions",
            "share of the energy",
            {KINDS[kind][0]: f"{kind}.spike_share" for kind in ("gradient", "mean_gradient", "momentum", "weight")},
            share=True,
            note="Discs: the gradient of one batch. Squares: the mean gradient. Diamonds: the optimizer's momentum. "
            "Crosses: the weights.",
        ),
        dot_figure(
            subjects,
            "The spike in Adam's second moment",
            "share",
            {
                "of the sum of E[g²]": "second_moment.share",
                "in the median entry": "second_moment.median_share",
                "tail's update": "second_moment.contraction",
            },
            share=True,
            note="Discs: what the spike holds of the sum of E[g²] over entries. Squares: in the median entry. "
            "Diamonds: the tail's update, as a share of what it would be without a spike.",
        ),
    ]


def structure_figures(subjects: Subjects) -> list[Figure | None]:
    """Overlaps of the noise with the signal and with itself, and its localisation."""
    overlaps = [
        dot_figure(
            subjects,
            f"Overlap of the noise's leading directions with those of {other}",
            "‖UᵀU'‖²/k",
            {side: f"noise.{key}{side}.share.value" for side in ("left", "right")},
            reference=("by chance, left", f"noise.{key}left.expected"),
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
        {"noise": "noise.localisation.value"},
        reference=("Gaussian of this shape", "noise.gaussian_localisation"),
        having="noise",
        note="1 would be noise on a single entry. Ticks: about what Gaussian entries have.",
    )
    return [*overlaps, localised]


def weight_figures(subjects: Subjects) -> list[Figure | None]:
    """Norms and stable ranks of the weights."""
    names = {"norm": "Frobenius norm", "spectral_norm": "Largest singular value", "stable_rank": "Stable rank"}
    return [
        dot_figure(subjects, f"{name} of the weights", name.lower(), {"": f"weight.{key}"}, having="weight")
        for key, name in names.items()
    ]
